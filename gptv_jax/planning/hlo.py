"""The collectives of a compiled step, read from its HLO text.

A collective in the body of a loop counts once for each iteration, so one in the scan over layers
counts once a layer. A collective that runs beside computation is spread over several instructions
(`-start` and `-done`, or on TPUs a chain of fusions that each carry a part) and counts as one.
"""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# TPUs compute a reduce-scatter in a fusion of this name, with an all-reduce and a slice inside.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"
BITS = {"pred": 8}  # other types have their bits in their names: bf16, f32, s32, u8

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|[\w.\-%]+)")
_NAME = re.compile(r"[\w.\-]+")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
# Between TPU slices the hosts send; each `send` belongs to one collective of all slices.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SIZE = re.compile(r"'([^']+)'=(\d+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """One collective of a step."""

    kind: str  # one of KINDS
    count: int  # in a step
    bytes: int  # of one execution: of the whole array gathered, reduced or moved, on one device
    # The group of devices that device 0 is in, by place in the mesh; (): one device of every slice.
    group: tuple[int, ...]


def collectives(text: str, devices: int) -> tuple[list[Collective], list[str]]:
    """The collectives of a compiled program, and its loops of unknown length with collectives.

    `text` is the HLO text of the compiled module, which runs on so many `devices`.
    """
    computations, entry = _parse(text)
    found: dict[tuple, Collective] = {}
    outer: dict[str, str] = {}  # by the body of a loop: the computation that the loop is in
    unknown: list[str] = []

    def walk(name: str, times: int, owner: str, fused: str = "") -> bool:
        """Collects the collectives that `owner` executes; returns whether there are any."""
        any_found = False
        for each in computations.get(name, ()):
            if kind := _kind(each):
                any_found = True
                key = (owner, _chain(each) or (name, each.name))
                if key not in found:
                    found[key] = _collective(each, kind, times, devices, fused)
            elif each.opcode == "while":
                body = _attribute(each, "body")
                iterations = _iterations(each, computations)
                outer[body] = owner
                if walk(body, times * (iterations or 1), body) and iterations is None:
                    unknown.append(each.name)
                    any_found = True
            else:
                for called in _NAME.findall(" ".join(_CALLED.findall(each.rest))):
                    inside = called if each.opcode == "fusion" else fused
                    any_found |= walk(called, times, owner, inside)
        return any_found

    def continued(owner: str, rest: tuple) -> bool:
        """Whether a collective in a loop is a part of a collective that began before the loop."""
        above = outer.get(owner)
        return above is not None and ((above, rest) in found or continued(above, rest))

    walk(entry, 1, entry)
    return [each for key, each in found.items() if not continued(*key)], unknown


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
    return computations, entry


def _kind(each: Instruction) -> str | None:
    if each.opcode == "send" and (between := _BETWEEN.search(each.rest)):
        return between[1].lower().replace("_", "-")
    kind = each.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _chain(each: Instruction) -> tuple[str, str] | None:
    """Chain and channel, equal for the parts of one collective that is spread over fusions."""
    chain = re.search(r'chain_id="(\d+)"', each.rest)
    return chain and (chain[1], _attribute(each, "channel_id"))


def _attribute(each: Instruction, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", each.rest)[1]


def _iterations(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Iterations of a loop that counts up from 0; None if the text does not say."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations.get(_attribute(loop, "condition"), [])
    ends = _whole_constants(condition)
    compares, step = [e for e in condition if "direction=LT" in e.rest], 1
    if len(compares) == 1:
        operands = _operands(compares[0])
        ends = {name: ends[name] for name in operands if name in ends}
        read = next((e for e in condition if e.name == operands[0]), None)
        if index := read and re.search(r"\bindex=(\d+)", read.rest):
            step = _step(computations.get(_attribute(loop, "body"), []), int(index[1]))
    return -(-next(iter(ends.values())) // step) if len(ends) == 1 else None


def _step(body: list[Instruction], index: int) -> int:
    """Increment of the loop's variable of that index; 1 if the text does not say."""
    results = _operands(body[-1]) if body and body[-1].opcode == "tuple" else []
    named, constants = {each.name: each for each in body}, _whole_constants(body)
    added = named.get(results[index]) if index < len(results) else None
    if added is None or added.opcode != "add":
        return 1
    return next((constants[name] for name in _operands(added) if name in constants), 1)


def _operands(each: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", each.rest)


def _whole_constants(computation: list[Instruction]) -> dict[str, int]:
    whole = (e for e in computation if e.opcode == "constant" and e.type[:5] in ("s32[]", "u32[]"))
    return {each.name: int(each.rest.partition(")")[0]) for each in whole}


def _collective(each: Instruction, kind: str, times: int, devices: int, fused: str) -> Collective:
    arrays = _ARRAY.findall(each.type)
    if each.opcode == "send":  # the array that is sent, then a context number and a token
        return Collective(kind, times, _bytes(*arrays[0]), ())
    group = _group(each.rest, devices)
    if each.opcode.endswith("-start") and kind != "all-reduce":
        # Operands, then results; a permute has two context numbers (scalars) at the end.
        arrays = [(dtype, shape) for dtype, shape in arrays if shape]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_bytes(*array) for array in arrays) * (len(group) if kind == "reduce-scatter" else 1)
    if kind == "all-reduce" and fused.startswith(FUSED_REDUCE_SCATTER):
        kind = "reduce-scatter"
    return Collective(kind, times, size, group)


def _bytes(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])  # of f8e4m3fn the first number
    return math.prod(_numbers(shape)) * bits // 8


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of devices; of a permute the first source and target.

    Groups are written as a list, as a reshaped and transposed range, or as axes of a mesh.
    """
    if found := _IOTA.search(rest):
        shape, dimensions, order = map(_numbers, found.groups())
        index = 0
    elif found := _MESH.search(rest):
        sizes = {name: int(size) for name, size in _SIZE.findall(found[1])}
        dimensions, order = _numbers(found[2]) or list(sizes.values()), _numbers(found[3])
        # The group varies along a whole axis 'x', or along a part 'x':(2)4 of an axis: its 4
        # indices after a part of size 2. Each axis becomes [before, varying, after].
        parts = {name: part for name, *part in _AXIS.findall(found[4])}
        shape, index = [], (0, slice(None), 0) * len(sizes)
        for name, size in sizes.items():
            before, varying = parts.get(name, (size, 1))
            before, varying = int(before or 1), int(varying or size)
            shape += [before, varying, size // (before * varying)]
    elif found := _LISTED.search(rest):
        return tuple(_numbers(found[1]))
    else:
        return tuple(range(devices))
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    ids = ids.transpose(order or range(ids.ndim)).reshape(shape)
    return tuple(ids[index].ravel().tolist())
