"""A plan as a table for people."""

from gptv_jax.planning.plan import Plan

WIDTH = 34  # of the first column
PARTS = {  # of the FLOPs and of the step time, by their names in JSON
    "matmul": "products with weights",
    "attention": "attention",
    "stem": "the stem of pixels",
    "teacher": "the teachers",
    "encoder": "the encoder",
    "decoder": "the decoder",
    "network": "network between slices",
}


def show(found: Plan, smallest: Plan | None) -> str:
    """The whole table of a plan, and of the plan on the fewest devices that fits, if any."""
    numbers, topology, training = found.numbers(), found.topology, found.training
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    remat, train = training.config.model.remat if training.tunable else "none", training.train
    needed = training.flops
    parts = ", ".join(f"{_si(n)} in {PARTS[part]}" for part, n in needed.items())
    examples = "clips" if training.config.data.frames else "images"
    split = f"{remat}, {train.microbatches} of a batch of {train.batch_size} {examples}"
    least = "no mesh of at most as many devices, by arithmetic"
    if smallest:
        count, flags = smallest.topology.count, " ".join(smallest.flags)
        least = f"{count} device{'s' if count > 1 else ''}, by arithmetic, with {flags}"
    rows = [
        ("topology", f"{slices}{topology.name}, {topology.count} devices ({topology.kind})"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())),
        ("rematerialisation, microbatches", split),
        ("", ""),
        ("parameters", f"{found.params:,}"),
        (f"FLOPs per {training.unit}", f"{_si(needed.total)}: {parts}"),
        ("FLOPs per step", _si(found.flops_per_step)),
        ("  executed", _si(found.executed)),
        *([("  encoding pixels, beside these", _si(n))] if (n := training.encoding) else []),
        ("", ""),
        *_memory(found, numbers),
        ("", ""),
        *_collectives(found, numbers),
        ("", ""),
        *_time(found, numbers),
        ("smallest that fits", least),
    ]
    if drawing := numbers["drawing"]:
        each = f"{_size(drawing['bytes_per_sequence'])} of keys and values each"
        least = drawing["seconds"] and f", {_seconds(drawing['seconds'])} at least"
        rows.append(
            ("drawn at a time at most", f"{drawing['sequences']} {examples}, {each}{least or ''}")
        )
    return "\n".join(f"{name:{WIDTH}}{value}".rstrip() for name, value in rows)


def ranking(plans: list[Plan]) -> str:
    """A table of plans in the given order, each with the flags to take."""
    lines = [] if plans[0].roofline else ["Ranked by memory: device speeds are unknown."]
    lines += [f"{'step at least':>15}{'no overlap':>12}{'memory':>12}  flags"]
    for each in plans:
        times = [_seconds(each.step_seconds), _seconds(each.roofline and each.roofline.serial)]
        size = _size(each.bytes_per_device) + ("" if each.fits else " !")
        lines.append(f"{times[0]:>15}{times[1]:>12}{size:>12}  {' '.join(each.flags)}")
    return "\n".join(lines)


def _memory(found: Plan, numbers: dict) -> list[tuple[str, str]]:
    total, there = found.bytes_per_device, found.topology.memory_bytes
    verdict = "fits" if found.fits else "DOES NOT FIT"
    share = f"{total / there:.0%} of the {_size(there)} that a program may take: {verdict}"
    return [
        ("bytes per device", "by the compiler" if found.compiled else "by arithmetic alone"),
        *((f"  {name}", _size(size)) for name, size in numbers["bytes"].items()),
        ("  together", f"{_size(total)}, {share}"),
    ]


def _collectives(found: Plan, numbers: dict) -> list[tuple[str, str]]:
    compiled = numbers["collectives_source"] == "compiler"
    rows = [("collectives per step", "in the compiled step" if compiled else "by arithmetic alone")]
    for each in found.traffic:
        line = f"{each.count:>7,} over {', '.join(each.axes) or 'no axis'}, {_size(each.bytes)}"
        line += f"; a device sends {_size(each.inside)}"
        line += f" inside, {_size(each.between)} between slices" if each.between else ""
        rows.append((f"  {each.kind}", line))
    if loops := numbers["loops_of_unknown_length"]:
        rows.append(("  counted once only", f"loops {', '.join(loops)}"))
    return rows if len(rows) > 1 else [("collectives per step", "none")]


def _time(found: Plan, numbers: dict) -> list[tuple[str, str]]:
    line = found.roofline
    if not line:
        return [("step time", f"not estimated: the speed of {found.topology.kind} is unknown")]
    parts = numbers["step_seconds"].items()
    times = ", ".join(f"{PARTS.get(name, name)} {_seconds(t)}" for name, t in parts if t)
    skips = "attention" in found.training.flops and found.executed < found.flops_per_step
    why = " (MFU counts the masked half of attention, which is skipped)" if skips else ""
    steps = f"{found.training.train.steps:,} steps at least"
    return [
        ("step time at least", f"{_seconds(line.bound)} (a bound: all parts overlapped)"),
        ("  parts", times),
        ("  without overlap", _seconds(line.serial)),
        ("MFU at most", f"{found.mfu:.0%}{why}"),
        (steps, f"{numbers['days']:,.2f} days, {numbers['device_hours']:,.0f} device-hours"),
    ]


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
