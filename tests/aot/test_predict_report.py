"""What is told of a predicted step: parts, phases, places, loops; the command over a text."""

from __future__ import annotations

import inspect
import json

import pytest

from benchmarks import predict_step
from engram_jax.aot import predict_report
from engram_jax.aot.predict import Assumptions, examine, predict, rounded
from engram_jax.config import parse_config
from engram_jax.config.errors import UserError
from tests.aot.test_predict import MATRIX, PRODUCT, product

CYCLES = 1_750_000  # of a v5p: a millisecond
STEP = """HloModule m, is_scheduled=true, num_partitions=128

FileNames
1 "/somewhere/site-packages/flax/linear.py"
2 "/home/me/project/model/block.py"
3 "/home/me/project/train.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=3 function_name_id=1 line=7 end_line=7}
2 {file_name_id=2 function_name_id=1 line=40 end_line=40}
3 {file_name_id=1 function_name_id=1 line=99 end_line=99}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%product (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  ROOT %dot = bf16[4096,4096]{1,0} dot(%a, %a)
}

%sum (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  ROOT %add = bf16[4096,4096]{1,0} add(%a, %a)
}

%condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %z = bf16[4096,4096]{1,0} constant({...})
  %looped = bf16[4096,4096]{1,0} fusion(%z), kind=kOutput, calls=%product, METADATA(jvp()), CYCLES
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

ENTRY %main (x: bf16[4096,4096], n: s32[]) -> bf16[4096,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %f = bf16[4096,4096]{1,0} fusion(%x), kind=kOutput, calls=%product, METADATA(jvp()), CYCLES
  %g = bf16[4096,4096]{1,0} fusion(%f), kind=kLoop, calls=%sum, METADATA(transpose(jvp())), CYCLES
  %h = bf16[4096,4096]{1,0} fusion(%g), kind=kOutput, calls=%product, METADATA(transpose(jvp())/rematted_computation), CYCLES
  %zero = s32[] constant(0)
  %state = (s32[], s32[]) tuple(%zero, %n)
  %loop = (s32[], s32[]) while(%state), condition=%condition, body=%body
  %table = f32[1000000,128]{1,0} constant({...})
  %rows = f32[8192,128]{1,0} constant({...})
  %scatter.1 = f32[1000000,128]{1,0} fusion(%table, %rows), kind=kCustom
  %all = bf16[1280,64]{1,0} all-gather(%h), replica_groups={}, dimensions={0}
  ROOT %out = bf16[4096,4096]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"2765000000"}}}
}
"""  # noqa: E501
ROWS = 3 * 8192 * 128 * 4 / 2765e9  # seconds of the scatter: a row is read, written, and its update
SUM = 2 * 4096 * 4096 * 2 / 2765e9  # the lower ones of the elementwise fusion
GATHERED = 127 / 128 * 1280 * 64 * 2 / (3 * 1.8e11)


def step_text() -> str:
    lines = []
    for line in STEP.splitlines():
        if "METADATA(" in line:
            before, _, rest = line.partition("METADATA(")
            origin, _, after = rest.rpartition("), CYCLES")
            line = (
                f'{before}metadata={{op_name="jit(step)/{origin}/dot" stack_frame_id=3}}, '
                f'backend_config={{"window_config":{{"estimated_cycles":"{CYCLES}"}}}}{after}'
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def found():
    step = examine(step_text(), "v5p:4x4x8", Assumptions(unknown=4))
    return predict_report.predicted(step, tokens=1e6, flops=459e12)


def test_parts_and_phases_make_the_sums(found):
    parts = {
        "matmul": [6e-3, 6e-3],  # two, and one in four rounds
        "elementwise": [SUM, 1e-3],
        "kernels": [1e-3, 1e-3],
        "SparseCore": [0, 0],
        "scatter and sort": [ROWS, ROWS],
        "collectives": [GATHERED, GATHERED],
    }
    for name, seconds in parts.items():
        assert found["by_part"][name] == pytest.approx(seconds, abs=1e-6), name
    assert set(found["by_part"]) == set(parts)
    rest = 1e-3 + ROWS + GATHERED
    phases = {
        "forward": [5e-3, 5e-3],
        "backward": [SUM, 1e-3],
        "recomputation": [1e-3, 1e-3],
        "rest": [rest, rest],
    }
    assert found["by_phase"] == {k: pytest.approx(v, abs=1e-6) for k, v in phases.items()}
    total = [sum(v[k] for v in parts.values()) for k in (0, 1)]
    assert found["seconds"] == pytest.approx(total, abs=2e-6)
    assert found["tokens_per_s"] == pytest.approx([1e6 / s for s in reversed(total)], rel=1e-3)
    # The model's FLOPs take a device's peak a second, and there are 128.
    assert found["utilisation"] == pytest.approx([1 / 128 / s for s in reversed(total)], rel=1e-3)


def test_places_have_the_line_that_is_ours_and_its_caller(found):
    first = found["places"][0]
    assert first["lines"] == ["model/block.py:40", "project/train.py:7"]
    assert (first["part"], first["phase"]) == ("matmul", "forward")
    assert first["seconds"] == pytest.approx([5e-3, 5e-3]) and first["runs"] == 5
    seconds = [place["seconds"][1] for place in found["places"]]
    assert seconds == sorted(seconds, reverse=True) and len(seconds) == 6


def test_what_was_assumed_is_told(found):
    (loop,) = found["open_loops"]
    assert loop == {"name": "loop", "lines": [], "communicates": False, "rounds": 4}
    assert found["assumed"] == {"unknown": 4, "overflow": 4, "pairs": 0}
    table = predict_report.as_table(found)
    assert "4 rounds assumed  of the loop at loop" in table
    assert "matmul 0.006, elementwise 2.4e-05 .. 0.001, kernels 0.001" in table
    assert "matmul, forward: model/block.py:40 < project/train.py:7  dot bf16[4096, 4096]" in table


def test_programs_that_run_one_after_the_other():
    parts = [{"seconds": [1.0, 2.0]}, {"seconds": [3.0, 6.0]}]
    whole = predict_report.together(parts, 8)
    assert whole == {"seconds": [4.0, 8.0], "tokens_per_s": [1.0, 2.0]}
    told = "predicted 4 .. 8 s, 1 .. 2 tokens/s (a model, not a measurement)"
    assert predict_report.as_table(whole) == told


@pytest.mark.parametrize(
    ("config", "expert", "rounds"),
    [("engram27b", 8, 1.5), ("engram27b", 4, 3), ("moe27b", 2, 6), ("engram27b", 1, 1)],
)
def test_rounds_of_a_loop_over_chunks(config, expert, rounds):
    module = __import__(f"configs.{config}", fromlist=["get_config"])
    asked = module.get_config()
    asked.mesh.expert = expert
    asked = parse_config(asked)
    assert predict_report.expected_rounds(asked) == rounds
    assert predict_report.assumed_of(asked) == Assumptions(rounds, 0, 0)
    assert predict_report.assumed_of(asked, 5, 2, 100) == Assumptions(5, 2, 100)
    for bad in ((-1, 0, 0), (None, float("inf"), 0), (None, 0, float("nan"))):
        with pytest.raises(UserError, match="must be a number from 0 on"):
            predict_report.assumed_of(asked, *bad)


def test_the_command(compiled, tmp_path, capsys, monkeypatch):
    file = tmp_path / "x.after_codegen.txt"
    file.write_text(compiled("v5p:2x2x1", product, MATRIX, MATRIX))
    command = ["predict_step", str(file), "--slice", "v5p:2x2x1", "--json", "--top", "1"]
    monkeypatch.setattr("sys.argv", command)
    predict_step.main()
    first, *table = capsys.readouterr().out.splitlines()
    assert json.loads(first) == rounded(predict(file.read_text(), "v5p:2x2x1"))
    lines, number = inspect.getsourcelines(product)
    where = f"tests/aot/test_predict.py:{number + len(lines) - 1}"
    assert f"matmul, rest: {where}" in table[-1] and "bf16[4096, 4096]" in table[-1]
    assert 1000 * PRODUCT < float(table[-1].split()[0]) < 1250 * PRODUCT

    monkeypatch.setattr("sys.argv", [*command[:3], "v5p:4x4"])
    with pytest.raises(SystemExit):
        predict_step.main()
    assert "v5p:AxBxC" in capsys.readouterr().err


def test_a_text_without_lines_has_places_all_the_same():
    text = step_text()
    without = text[: text.index("FileNames")] + text[text.index("%product") :]
    step = examine(without, "v5p:4x4x8")
    assert all(place["lines"] == [] for place in predict_report.predicted(step)["places"])
    old = without.replace("stack_frame_id=3", 'source_file="/a/b/model.py" source_line=12')
    step = examine(old, "v5p:4x4x8")
    assert predict_report.predicted(step)["places"][0]["lines"] == ["b/model.py:12"]
