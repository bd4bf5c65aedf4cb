"""The parser of collectives, on programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gptv_jax.planning import hlo, plan

SIZES = {"a": 2, "b": 4}
FLOATS = 4  # bytes


def compiled(function, *shapes) -> list[plan.Traffic]:
    """What a function of local shards does on a mesh of 2 x 4 devices."""
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), (AxisType.Explicit,) * 2)
    inside = jax.shard_map(
        function, mesh=mesh, in_specs=(P("a", "b"),) * len(shapes), out_specs=P("a", "b")
    )
    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(mesh, P("a", "b")))
            for s in shapes
        ]
        text = jax.jit(inside).lower(*arguments).compile().as_text()
    found, unknown = hlo.collectives(text, 8)
    assert not unknown
    return plan.traffic_of(found, SIZES, [0] * 8)


def sum_over(axis):
    def summed(x):
        return jax.lax.psum(jnp.sin(x), axis) + x

    return summed


@pytest.mark.parametrize(("axis", "ways"), [("a", 2), ("b", 4), (("a", "b"), 8)])
def test_an_all_reduce_is_of_the_whole_array_over_its_axes(axis, ways):
    (row,) = compiled(sum_over(axis), (16, 32))
    assert row.kind == "all-reduce" and row.count == 1
    assert set(row.axes) == set(axis)
    assert row.bytes == 8 * 8 * FLOATS  # of a device's shard
    assert row.inside == pytest.approx(2 * row.bytes * (ways - 1) / ways) and row.between == 0


def test_a_gather_counts_the_gathered_array_and_a_scatter_the_one_that_it_sums():
    def there_and_back(x):
        whole = jax.lax.all_gather(x, "b", axis=1, tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "b", scatter_dimension=1, tiled=True)

    rows = {row.kind: row for row in compiled(there_and_back, (16, 32))}
    assert set(rows) == {"all-gather", "reduce-scatter"}
    for row in rows.values():
        assert row.axes == ("b",) and row.bytes == 8 * 32 * FLOATS
        assert row.inside == pytest.approx(row.bytes * 3 / 4)


def test_what_is_exchanged_or_passed_on_counts_as_it_is():
    def exchanged(x):
        x = jax.lax.all_to_all(x, "b", 0, 1, tiled=True)
        return jnp.reshape(jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), (8, 8))

    rows = {row.kind: row for row in compiled(exchanged, (16, 32))}
    assert rows["all-to-all"].axes == ("b",) and rows["collective-permute"].axes == ("a",)
    assert rows["collective-permute"].bytes == rows["collective-permute"].inside == 64 * FLOATS
    assert rows["all-to-all"].bytes == 64 * FLOATS


def test_a_collective_in_nested_loops_counts_once_a_turn():
    def looped(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "b")), None

        def outer(x, _):
            return jnp.cos(jax.lax.psum(jax.lax.scan(inner, x, None, length=3)[0], "a")), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    rows = {row.axes: row for row in compiled_loops(looped)}
    assert rows[("b",)].count == 15 and rows[("a",)].count == 5


def compiled_loops(function):
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), (AxisType.Explicit,) * 2)
    inside = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.set_mesh(mesh):
        text = jax.jit(inside).lower(jnp.ones((8, 8))).compile().as_text()
    return plan.traffic_of(hlo.collectives(text, 8)[0], SIZES, [0] * 8)


# Forms that TPUs have and simulated devices do not.


def module(*instructions: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in instructions)
    return f"HloModule m\n\n{more}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", (0, 2)),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", (0, 2, 4, 6)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", (0, 1)),
        ("replica_groups=mesh['x'=1,'y'=2,'z'=4], device_ids=([2,2,2]T(1,0,2)) {'y'}", (0, 2)),
    ],
)
def test_groups_are_read_in_every_notation(written, group):
    text = module(f"%r = f32[8]{{0}} all-reduce(%p), channel_id=1, {written}, to_apply=%add")
    (found,) = hlo.collectives(text, 8)[0]
    assert found.group == group


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=1", "all-gather", 32),
        (
            "((f32[2]{0}, bf16[4]{0:T(128)(2,1)}), (f32[8]{0}, bf16[16]{0})) all-gather-start(%p)",
            "all-gather",
            64,
        ),
        ("f32[8]{0:T(8,128)S(1)} all-reduce-start(%p), channel_id=1", "all-reduce", 32),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%p)", "collective-permute", 32),
        ("f8e4m3fn[8]{0} all-reduce(%p)", "all-reduce", 8),
        ("(f32[]{:T(128)}, /*index=1*/bf16[3,2]{1,0}) all-reduce(%p)", "all-reduce", 16),
    ],
)
def test_a_start_counts_with_its_results_and_its_done_not_at_all(line, kind, size):
    group = "source_target_pairs={{0,1}}" if "permute" in line else "replica_groups={{0,1}}"
    name = kind if "-start" in line else "nothing"
    done = f"%d = f32[8]{{0}} {name}-done(%s)"
    (found,) = hlo.collectives(module(f"%s = {line}, {group}", done), 2)[0]
    assert (found.kind, found.bytes, found.count) == (kind, size, 1)


FUSION = """%{name} (p.1: f32[8]) -> f32[8] {{
  %part.{number} = f32[8]{{0}} {opcode}(%p.1), channel_id=1, replica_groups=[1,4]<=[4]{chain}
  ROOT %t.{number} = f32[2]{{0}} dynamic-slice(%part.{number})
}}
"""


@pytest.mark.parametrize(
    ("chains", "count"), [(("4", "4", "4"), 1), (("4", "5", "4"), 2), ((None, None, None), 3)]
)
def test_a_chain_of_fusions_is_one_collective(chains, count):
    parts, calls = "", []
    for i, chain in enumerate(chains):
        attribute = f', frontend_attributes={{chain_id="{chain}"}}' if chain else ""
        name = f"async_collective_fusion.{i}"
        parts += FUSION.format(name=name, number=i, opcode="all-gather", chain=attribute)
        calls.append(f"%f.{i} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%{name}")
    found = hlo.collectives(module(*calls, more=parts), 4)[0]
    assert [(each.bytes, each.group) for each in found] == count * [(32, (0, 1, 2, 3))]


def test_a_fused_reduce_and_slice_is_a_reduce_scatter():
    fused = FUSION.format(name="all-reduce-scatter.1", number=1, opcode="all-reduce", chain="")
    call = "%f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = hlo.collectives(module(call, more=fused), 4)[0]
    assert found.kind == "reduce-scatter" and found.bytes == 32


LOOP = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
%condition (t: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(24), metadata={op_name="lt"}
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, END), direction=LT
}
"""


def test_the_length_of_a_loop_is_known_from_its_condition_or_from_what_it_says():
    loop = "%w = (s32[], f32[8]) while(%t), condition=%condition, body=%body"
    from_condition = hlo.collectives(module(loop, more=LOOP.replace("END", "%end")), 2)
    assert [each.count for each in from_condition[0]] == [24] and not from_condition[1]
    told = f'{loop}, backend_config={{"known_trip_count":{{"n":"7"}}}}'
    assert hlo.collectives(module(told, more=LOOP), 2)[0][0].count == 7


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    loop = "%w = (s32[], f32[8]) while(%t), condition=%condition, body=%body"
    found, unknown = hlo.collectives(module(loop, more=LOOP.replace("END", "%other")), 2)
    assert [each.count for each in found] == [1] and unknown == ["w"]


# What goes between slices.


def test_a_sum_over_slices_is_scattered_inside_before_it_crosses():
    sizes, slice_of = {"data": 2, "fsdp": 4}, [0] * 4 + [1] * 4
    group = tuple(range(8))
    (row,) = plan.traffic_of([hlo.Collective("all-reduce", 3, 800, group)], sizes, slice_of)
    assert row.axes == ("data", "fsdp") and row.bytes == 2400
    assert row.inside == pytest.approx(3 * 2 * 800 * 3 / 4)
    assert row.between == pytest.approx(3 * 2 * 800 / 4 * 1 / 2)
    (inside,) = plan.traffic_of([hlo.Collective("all-gather", 1, 800, (0, 1))], sizes, slice_of)
    assert inside.axes == ("fsdp",) and inside.between == 0
    (across,) = plan.traffic_of([hlo.Collective("all-reduce", 1, 800, (0, 4))], sizes, slice_of)
    assert across.axes == ("data",) and across.inside == 0 and across.between == 800


def test_rows_of_one_kind_over_the_same_axes_are_added_up():
    found = [hlo.Collective("all-gather", n, 10 * n, (0, 1)) for n in (1, 2, 3)]
    (row,) = plan.traffic_of(found, {"a": 4, "b": 2}, [0] * 8)
    assert row.count == 6 and row.bytes == 10 + 40 + 90 and row.axes == ("b",)
