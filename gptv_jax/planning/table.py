"""A plan as a table for people."""

from gptv_jax.planning.plan import Plan

WIDTH = 34  # of the first column
PARTS = {
    "matmul": "products with weights",
    "attention": "attention",
    "encoder": "the encoder",
    "decoder": "the decoder",
}


def show(found: Plan, smallest: Plan | None) -> str:
    """The whole table of a plan, and of the plan on the fewest devices that fits, if any."""
    numbers, train = found.numbers(), found.training.train
    rows = [
        ("topology", _topology(found)),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())),
        (
            "rematerialisation, microbatches",
            f"{found.training.remat}, {train.microbatches} of a batch of {train.batch_size} images",
        ),
        None,
        ("parameters", f"{found.params:,}"),
        *_flops(found),
        None,
        *_memory(found, numbers),
        None,
        *_collectives(found),
        None,
        *_time(found, numbers),
        ("smallest that fits", _smallest(smallest)),
    ]
    return "\n".join(f"{row[0]:{WIDTH}}{row[1]}".rstrip() if row else "" for row in rows)


def ranking(plans: list[Plan]) -> str:
    """A table of plans in the given order, each with the flags to take."""
    lines = [] if plans[0].roofline else ["Ranked by memory: device speeds are unknown."]
    lines += [f"{'step at least':>15}{'no overlap':>12}{'memory':>12}  flags"]
    for each in plans:
        times = [_seconds(each.step_seconds), _seconds(each.roofline and each.roofline.serial)]
        size = _size(each.bytes_per_device) + ("" if each.fits else " !")
        lines.append(f"{times[0]:>15}{times[1]:>12}{size:>12}  {' '.join(each.flags)}")
    return "\n".join(lines)


def _topology(found: Plan) -> str:
    topology = found.topology
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    return f"{slices}{topology.name}, {topology.count} devices ({topology.kind})"


def _flops(found: Plan) -> list[tuple[str, str]]:
    needed = found.training.flops
    parts = ", ".join(f"{_si(n)} in {PARTS[part]}" for part, n in needed.items())
    return [
        (f"FLOPs per {found.training.unit}", f"{_si(needed.total)}: {parts}"),
        ("FLOPs per step", _si(found.flops_per_step)),
        ("  executed", _si(found.executed)),
    ]


def _memory(found: Plan, numbers: dict) -> list[tuple[str, str]]:
    source = {"compiler": "by the compiler", "arithmetic": "by arithmetic alone"}
    rows = [("bytes per device", source[numbers["bytes_per_device_source"]])]
    rows += [(f"  {name}", _size(size)) for name, size in numbers["bytes"].items()]
    total, there = found.bytes_per_device, found.topology.memory_bytes
    verdict = "fits" if found.fits else "DOES NOT FIT"
    share = f"{total / there:.0%} of the {_size(there)} that a program may take: {verdict}"
    return [*rows, ("  together", f"{_size(total)}, {share}")]


def _collectives(found: Plan) -> list[tuple[str, str]]:
    source = found.numbers()["collectives_source"]
    told = "in the compiled step" if source == "compiler" else "by arithmetic alone"
    rows = [("collectives per step", told)]
    for each in found.traffic:
        line = f"{each.count:>7,} over {', '.join(each.axes) or 'no axis'}, {_size(each.bytes)}"
        line += f"; a device sends {_size(each.inside)}"
        line += f" inside, {_size(each.between)} between slices" if each.between else ""
        rows.append((f"  {each.kind}", line))
    if found.compiled and found.compiled.unknown_loops:
        rows.append(("  counted once only", f"loops {', '.join(found.compiled.unknown_loops)}"))
    return rows if len(rows) > 1 else [("collectives per step", "none")]


def _time(found: Plan, numbers: dict) -> list[tuple[str, str]]:
    line = found.roofline
    if not line:
        return [("step time", f"not estimated: the speed of {found.topology.kind} is unknown")]
    parts = {
        "compute": line.compute,
        "memory": line.memory,
        "interconnect": line.interconnect,
        "network between slices": line.network,
    }
    told = ", ".join(f"{name} {_seconds(t)}" for name, t in parts.items() if t)
    steps = found.training.train.steps
    return [
        ("step time at least", f"{_seconds(line.bound)} (a bound: all parts overlapped)"),
        ("  parts", told),
        ("  without overlap", _seconds(line.serial)),
        ("MFU at most", f"{found.mfu:.0%}{_convention(found)}"),
        (
            f"{steps:,} steps at least",
            f"{numbers['days']:,.2f} days, {numbers['device_hours']:,.0f} device-hours",
        ),
    ]


def _convention(found: Plan) -> str:
    attends = "attention" in found.training.flops
    skipped = attends and found.executed < found.flops_per_step
    return " (MFU counts the masked half of attention, which is skipped)" if skipped else ""


def _smallest(found: Plan | None) -> str:
    if not found:
        return "no mesh of at most as many devices, by arithmetic"
    count = found.topology.count
    devices = f"{count} device{'s' if count > 1 else ''}"
    return f"{devices}, by arithmetic, with {' '.join(found.flags)}"


def _size(count: float | int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _si(count: float | int) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.4g} {unit}".rstrip()
        count /= 1000
    return f"{count:,.4g} Z"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
