"""What a schedule hides and waits for: by hand, and in the three forms that libtpu writes."""

from __future__ import annotations

import pytest

from engram_jax.aot.predict import examine
from engram_jax.aot.timeline import LINKS, SPARSE_CORES, Timeline, pair

MS = 1_750_000  # cycles of a v5p
# 270 MB received over three rings of 1.8e11 bytes/s: 0.5 ms. n = 128: 127 / 128 of the output.
WIRE = 0.5e-3
OUTPUT = "bf16[128,1062992]{1,0}"  # 128 x 1062992 x 2 bytes x 127 / 128 = 270.0 MB
SHARD = "bf16[1,1062992]{1,0}"


def fused(name: str, operand: str, ms: float) -> str:
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{round(ms * MS)}"}}}}'
    return f"%{name} = bf16[64,64]{{1,0}} fusion({operand}), kind=kOutput, calls=%product, {config}"


def module(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        "HloModule m, is_scheduled=true, num_partitions=128\n\n"
        "%product (a: bf16[64,64]) -> bf16[64,64] {\n  %a = bf16[64,64]{1,0} parameter(0)\n"
        "  ROOT %dot = bf16[64,64]{1,0} dot(%a, %a)\n}\n\n"
        f"{more}ENTRY %main (x: bf16[64,64], w: {SHARD}) -> bf16[64,64] {{\n"
        f"  %x = bf16[64,64]{{1,0}} parameter(0)\n  %w = {SHARD} parameter(1)\n{body}\n"
        f"  ROOT %out = bf16[64,64]{{1,0}} fusion(%x), kind=kLoop, calls=%product\n}}\n"
    )


def overlap(text: str):
    step = examine(text, "v5p:4x4x8")
    return step.timeline.overlaps[LINKS], step


START = f"%s = ({SHARD}, {OUTPUT}) all-gather-start(%w), replica_groups={{}}, dimensions={{0}}"
DONE = f"%d = {OUTPUT} all-gather-done(%s)"


@pytest.mark.parametrize(("ms", "exposed"), [(0.2, 0.3e-3), (0.5, 0), (2, 0)])
def test_a_start_and_its_done(ms, exposed):
    found, step = overlap(module(START, fused("f", "%x", ms), DONE, fused("g", "%x", 1)))
    assert found.busy == found.started == pytest.approx(WIRE, rel=1e-5)
    assert list(found.between) == pytest.approx([ms * 1e-3] * 2)
    assert list(found.waits) == pytest.approx([exposed] * 2, abs=1e-8)
    # The sum counts both, as if nothing overlapped.
    assert step.seconds()[1] == pytest.approx(WIRE + ms * 1e-3 + 1e-3, rel=1e-5)


def test_a_collective_that_is_not_asynchronous_is_exposed():
    whole = f"%g = {OUTPUT} all-gather(%w), replica_groups={{}}, dimensions={{0}}"
    found, _ = overlap(module(fused("f", "%x", 1), whole, fused("h", "%x", 1)))
    assert found.started == 0 and list(found.between) == [0, 0]
    assert list(found.waits) == pytest.approx([WIRE] * 2, rel=1e-5)


def test_two_transfers_share_the_links_and_the_computing():
    """0.6 ms hide of 2 x 0.5 ms: the second begins when the first has ended."""
    again = [START.replace("%s ", "%s2 "), DONE.replace("%d ", "%d2 ").replace("(%s)", "(%s2)")]
    found, _ = overlap(module(START, again[0], fused("f", "%x", 0.6), DONE, again[1]))
    assert found.started == pytest.approx(2 * WIRE, rel=1e-5)
    assert list(found.between) == pytest.approx([1.2e-3] * 2)
    assert list(found.waits) == pytest.approx([0.4e-3] * 2, abs=1e-8)


def test_a_loop_waits_in_every_round():
    body = (
        "%condition (p: (s32[])) -> pred[] {\n  %p = (s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n  %n = s32[] constant(3)\n"
        "  ROOT %less = pred[] compare(%i, %n), direction=LT\n}\n\n"
        "%body (p: (s32[])) -> (s32[]) {\n  %p = (s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n  %one = s32[] constant(1)\n"
        f"  %next = s32[] add(%i, %one)\n  %w = {SHARD} constant({{...}})\n"
        f"  %x = bf16[64,64]{{1,0}} constant({{...}})\n  {START}\n  {fused('f', '%x', 0.2)}\n"
        f"  {DONE}\n  ROOT %t = (s32[]) tuple(%next)\n}}\n\n"
    )
    lines = (
        "%zero = s32[] constant(0)",
        "%state = (s32[]) tuple(%zero)",
        "%loop = (s32[]) while(%state), condition=%condition, body=%body",
    )
    found, _ = overlap(module(*lines, more=body))
    assert found.busy == pytest.approx(3 * WIRE, rel=1e-5)
    assert list(found.waits) == pytest.approx([3 * 0.3e-3] * 2, abs=1e-8)
    # One that is under way around the loop hides behind all of it, its waits included, on links
    # that are free when the loop begins: 0.5 of 1.5 ms.
    outer = START.replace("%s ", "%outer "), DONE.replace("%d ", "%e ").replace("%s", "%outer")
    found, _ = overlap(module(outer[0], *lines, outer[1], more=body))
    assert list(found.waits) == pytest.approx([3 * 0.3e-3] * 2, abs=1e-8)
    assert list(found.between) == pytest.approx([6 * 0.2e-3] * 2)


def spread(name: str, target: str, chain: int) -> str:
    """The inside of a fusion that starts, continues or ends a collective, as libtpu writes it."""
    call = f', custom_call_target="{target}"' if target else ""
    ends = f"ROOT %c.{name} = {OUTPUT} custom-call(%g.{name}){call}" if target else ""
    root = "" if target else f"%dot.{name} = bf16[64,64]{{1,0}} dot(%w.{name}, %w.{name})\n  ROOT "
    return (
        f"%{name} (w: {SHARD}) -> {OUTPUT} {{\n  %w.{name} = {SHARD} parameter(0)\n"
        f"  {root}%g.{name} = {OUTPUT} all-gather(%w.{name}), replica_groups={{}}, dimensions={{0}}"
        f', frontend_attributes={{chain_id="{chain}"}}, backend_config='
        f'{{"async_collective_fusion_config":{{"flag_start":"2"}}}}\n  {ends}\n}}\n\n'
    )


def test_collectives_spread_over_fusions():
    """Two begin, one fusion computes beside both, and they end in the other order."""
    target = "AsyncCollective"
    inside = "".join(
        spread(f"{kind}{k}", word and target + word, k)
        for kind, word in (("start", "Start"), ("middle", ""), ("done", "Done"))
        for k in (0, 1)
    )
    both = f"({OUTPUT}, {OUTPUT})"
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{round(0.6 * MS)}"}}}}'
    lines = (
        *(f"%s{k} = {OUTPUT} fusion(%w), kind=kCustom, calls=%start{k}" for k in (0, 1)),
        f"%m = {both} fusion(%s0, %s1), kind=kOutput, calls=%middle0, {config}",
        f"%m0 = {OUTPUT} get-tuple-element(%m), index=0",
        f"%m1 = {OUTPUT} get-tuple-element(%m), index=1",
        f"%d1 = {OUTPUT} fusion(%m1), kind=kCustom, calls=%done1",
        fused("f", "%x", 0.1),
        f"%d0 = {OUTPUT} fusion(%m0), kind=kCustom, calls=%done0",
    )
    found, _ = overlap(module(*lines, more=inside))
    assert found.started == found.busy == pytest.approx(2 * WIRE, rel=1e-5)
    # The second is done first, and waits for both: 0.4 ms; the first has arrived long before.
    assert list(found.waits) == pytest.approx([0.4e-3] * 2, abs=1e-8)
    assert list(found.between) == pytest.approx([(0.6 + 0.7) * 1e-3] * 2)


def test_a_transfer_without_a_done_is_waited_for_at_the_end():
    found, _ = overlap(module(START, fused("f", "%x", 0.2)))
    assert list(found.waits) == pytest.approx([0.3e-3] * 2, abs=1e-8)


def test_sparse_cores_gather_beside_the_core():
    rows = 8192 * 128 * 4
    sentinel = 'backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}'
    inside = (
        "%gather (t: f32[8192,128]) -> f32[8192,128] {\n"
        "  %t = f32[8192,128]{1,0} parameter(0)\n"
        f"  ROOT %r = f32[8192,128]{{1,0}} fusion(%t), kind=kCustom, calls=%product, {sentinel}\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    lines = (
        "%t = f32[8192,128]{1,0} constant({...})",
        "%s = ((f32[8192,128]), f32[8192,128]{1,0}, u32[]) async-start(%t), calls=%gather",
        "%u = ((f32[8192,128]), f32[8192,128]{1,0}, u32[]) async-update(%s)",
        fused("f", "%x", 0.001),
        "%d = f32[8192,128]{1,0} async-done(%u)",
    )
    step = examine(module(*lines, more=inside), "v5p:4x4x8")
    found, seconds = step.timeline.overlaps[SPARSE_CORES], 2 * rows / 2765e9
    assert found.started == pytest.approx(seconds)
    assert list(found.waits) == pytest.approx([seconds - 1e-6] * 2, abs=1e-9)


def test_lower_prices_hide_less():
    timeline = Timeline()
    timeline.start("a", {LINKS: 3.0})
    timeline.compute(pair(1.0, 5.0))
    timeline.done("a")
    timeline.block(LINKS, 1.0)
    found = timeline.overlaps[LINKS]
    assert list(found.waits) == [3.0, 1.0] and list(found.between) == [1.0, 5.0]
    assert (found.busy, found.started) == (4.0, 3.0) and list(timeline.core) == [1.0, 5.0]
