"""The programs of one revision, written down: same_program.py runs this once per revision.

    cd CHECKOUT && python /PATH/same_program_probe.py FOLDER CASE ...

Lowers, and does not compile, the steps of every CASE for a slice of a v5p into FOLDER, one file
CASE.PROGRAM.txt each (same_program_text.py):

    train                  what launch.py --mode=compile would compile
    evaluate               the Evaluator's step
    decode                 a further token of the plain decoder, which a run's samples come from
    serve.*, chip.*        the engine's compiled spans for a step of decoding and one of a prompt,
                           on the slice, and on one chip, where kernels run outside of shard_map

The package is the one in the folder that this runs in, whatever is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before the package is imported; this file's own folder, with the canonical text, stays behind it.
sys.path.insert(0, str(Path.cwd()))

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver
from jax.sharding import NamedSharding, PartitionSpec
from same_program_text import canonical

# Where a name is, the newest place first. A revision needs one of them.
NAMES = {
    "main": ("engram_jax.cli:main", "launch:main"),
    "parse_flags": (
        "engram_jax.program_flags:parse_flags",
        "engram_jax.cli:parse_flags",
        "launch:parse_flags",
    ),
    "parse_config": ("engram_jax.config:parse_config", "engram_jax.config:parse"),
    "slice_topology": ("engram_jax.aot.topology:slice_topology",),
    "make_mesh": ("engram_jax.sharding.rules:make_mesh",),
    "build_addressing": (
        "engram_jax.addressing:build_addressing",
        "engram_jax.addressing:build",
        "engram_jax.address:build",
    ),
    "build_training": ("engram_jax.training.state:build_training",),
    "build_program": ("engram_jax.train_state:build_program",),
    "abstract_state": (
        "engram_jax.training.state:abstract_state",
        "engram_jax.train_state:abstract_state",
    ),
    "Evaluator": (
        "engram_jax.evaluation.held_out:Evaluator",
        "engram_jax.evaluation.evaluate:Evaluator",
        "engram_jax.evaluate:Evaluator",
    ),
    "Weights": ("engram_jax.model.program:Weights", "engram_jax.generate:Weights"),
    "start": ("engram_jax.model.decode:start", "engram_jax.generate:start"),
    "session_shardings": (
        "engram_jax.model.decode:session_shardings",
        "engram_jax.generate:session_shardings",
    ),
    "jit_extend": ("engram_jax.model.decode:jit_extend", "engram_jax.generate:jit_extend"),
    "EngineSteps": (
        "engram_jax.serve.engine_steps:EngineSteps",
        "engram_jax.serve.engine_steps:Steps",
        "engram_jax.serve.steps:Steps",
    ),
    "StepBatch": (
        "engram_jax.serve.engine_steps:StepBatch",
        "engram_jax.serve.engine_steps:Batch",
        "engram_jax.serve.steps:Batch",
    ),
    "PAGES_FROM": ("engram_jax.serve.engine_steps:PAGES_FROM", "engram_jax.serve.steps:PAGES_FROM"),
}
# What a method of EngineSteps is called, the newest name first.
METHODS = {
    "span": ("span", "piece"),
    "swap_out": ("swap_out", "take_out"),
    "swap_in": ("swap_in", "put_back"),
}

# How a configuration becomes (what training's functions take, what the model's functions take).
BUILDERS: tuple[Callable[..., tuple[Any, Any]], ...] = (
    lambda *what: _twice(find("build_training")(*what)),  # a program, and more
    lambda *what: _twice(find("build_program")(*what)),
)

# Case -> its configuration, slice and what is changed to have every axis of the mesh, and few
# layers: one dense, then experts, with memory in the second and the last.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "engram_tiny": ("engram_tiny", "v5p:2x2x1", {"mesh.expert": 2, "train.accumulation": 2}),
    "moe_tiny": ("moe_tiny", "v5p:2x2x1", {"mesh.tensor": 2}),
    "engram27b": (
        "engram27b",
        "v5p:2x2x4",
        {"model.layers": 4, "model.engram.layers": (1, 3)},
    ),
}
ONE_CHIP = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.tensor": 1}
SHARE_OF_CANONICAL = 0.766


class MissingError(Exception):
    """A name that this revision has in none of its known places."""


def find(name: str) -> Any:
    """What NAMES says. Raises MissingError if it is nowhere."""
    for place in NAMES[name]:
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?"):
                raise
        except AttributeError:
            continue
    raise MissingError(f"{name}: in none of {', '.join(NAMES[name])}; add its place to NAMES")


def method(steps: Any, name: str) -> Callable:
    """What METHODS says. Raises MissingError if there is none of these."""
    for known in METHODS[name]:
        if hasattr(steps, known):
            return getattr(steps, known)
    raise MissingError(f"{name}: {type(steps)} has none of {METHODS[name]}; add its to METHODS")


def _twice(program: Any) -> tuple[Any, Any]:
    return program, program


def built(config: Any, mesh: Any) -> tuple[Any, Any]:
    """(training, program) of a configuration, by the first of BUILDERS that the revision has."""
    why: list[str] = []
    for build in BUILDERS:
        try:
            return build(config, _addressing(config), mesh)
        except MissingError as error:
            why.append(str(error))
    raise MissingError("; ".join(why))


def _addressing(config: Any) -> Any:
    """The configuration's, with a made-up compression of the tokenizer's ids."""
    if not config.model.engram.layers:
        return None
    tokens = config.tokenizer
    size = tokens.canonical_vocab_size or round(SHARE_OF_CANONICAL * tokens.vocab_size)
    known = dataclasses.replace(tokens, canonical_vocab_size=size)
    addressing = find("build_addressing")(dataclasses.replace(config, tokenizer=known), None)
    ids = np.arange(tokens.vocab_size, dtype=np.int32) % size
    return dataclasses.replace(addressing, compression=ids)


# ---- functions that are lowered where they would be run ------------------------------------------


class Recorded:
    """A jitted function that, called with shapes, is lowered and returns shapes."""

    def __init__(self, jit: Callable, function: Callable, how: dict[str, Any]):
        self._jitted, self._how = jit(function, **how), how
        self.lowered: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return self._jitted(*args, **kwargs)
        self.lowered = self._jitted.lower(*args, **kwargs)
        out = self.lowered.out_info
        where = self._how.get("out_shardings")
        if where is None:
            return out
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            out,
            jax.tree.broadcast(where, out),
        )

    @property
    def options(self) -> dict[str, Any]:
        return dict(self._how.get("compiler_options") or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Functions that are jitted in here are Recorded, and in the list."""
    made: list[Recorded] = []
    jit = jax.jit

    def record(function: Callable | None = None, **how: Any) -> Any:
        if function is None:
            return lambda function: record(function, **how)
        made.append(Recorded(jit, function, how))
        return made[-1]

    jax.jit = record
    try:
        yield made
    finally:
        jax.jit = jit


class _Seen(BaseException):
    """Ends a --mode=compile where it would compile; passes every `except Exception`."""


def compiled_by_launch(*arguments: str) -> tuple[Any, dict[str, Any]]:
    """(lowered program, compiler options) that `launch.py --mode=compile ARGUMENTS` compiles."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def compile_(self: Any, compiler_options: Any = None, **_: Any) -> Any:
        seen.append((self, dict(compiler_options or {})))
        raise _Seen

    argv = ["launch.py", "--mode=compile", *arguments]
    before, saved, own = sys.argv, flagsaver.save_flag_values(), jax.stages.Lowered.compile
    sys.argv, jax.stages.Lowered.compile = argv, compile_
    try:
        with contextlib.suppress(_Seen):
            find("main")(find("parse_flags")(argv))
    finally:
        sys.argv, jax.stages.Lowered.compile = before, own
        for name in [n for n in flags.FLAGS if n.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flagsaver.restore_flag_values(flagsaver.save_flag_values() | saved)
    ((lowered, options),) = seen
    return lowered, {k: v for k, v in options.items() if not k.startswith("xla_dump")}


def write(path: Path, lowered: Any, options: dict[str, Any]) -> None:
    """The canonical text, after what decides a program beside its StableHLO: the compiler's
    options, the order of the devices, and constants that are passed as arguments."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(lowered.out_info)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    devices = [d.id for d in meshes[0].devices.flat] if meshes else []
    constants = [
        f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
        for value in map(np.asarray, getattr(lowered._lowering, "const_args", None) or ())
    ]
    head = [
        f"// options {dict(sorted(options.items()))}",
        f"// devices {devices}",
        *(f"// constant {constant}" for constant in constants),
    ]
    path.write_text("\n".join([*head, canonical(lowered.compiler_ir()), ""]))


# ---- the programs of a case ----------------------------------------------------------------------


def programs(case: str, folder: Path) -> None:
    """Everything that CASES[case] lowers, as files CASE.PROGRAM.txt."""
    name, slice_, overrides = CASES[case]
    given = [f"--config.{key}={value}" for key, value in overrides.items()]
    what = f"--config=configs/{name}.py", f"--topology={slice_}", "--program=train"
    write(folder / f"{case}.train.txt", *compiled_by_launch(*what, *given))
    devices = find("slice_topology")(slice_).devices
    config = configuration(name, overrides)
    training, program = built(config, find("make_mesh")(config.mesh, devices))
    evaluation = evaluate(training, program)
    write(folder / f"{case}.evaluate.txt", evaluation.lowered, evaluation.options)
    extension = decode(training, program)
    write(folder / f"{case}.decode.txt", extension.lowered, extension.options)
    for part, step in served(training, program):
        write(folder / f"{case}.serve.{part}.txt", step.lowered, step.options)
    config = configuration(name, overrides | ONE_CHIP)
    mesh = find("make_mesh")(config.mesh, devices[:1])
    # The kernels look at the mesh in context; on a real chip, at the default device.
    with jax.set_mesh(mesh):
        for part, step in served(*built(config, mesh)):
            write(folder / f"{case}.chip.{part}.txt", step.lowered, step.options)


def configuration(name: str, overrides: dict[str, Any]) -> Any:
    values = importlib.import_module(f"configs.{name}").get_config()
    values.update_from_flattened_dict(overrides)
    return find("parse_config")(values)


def evaluate(training: Any, program: Any) -> Recorded:
    """The evaluation step, lowered for a batch as the pipeline makes it."""
    state, config, mesh = find("abstract_state")(training), program.config, program.mesh
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    shape = (config.data.batch_size, config.data.seq_len)
    inputs = ("tokens", "targets", "segments", "positions")
    batch = {key: jax.ShapeDtypeStruct(shape, np.int32, sharding=cut) for key in inputs}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=cut)
    with recorded() as made:
        try:
            find("Evaluator")(program, None)
        except AttributeError:  # it is made of what training has
            find("Evaluator")(training, None)
    (step,) = made
    step(state.params, state.router_bias, state.memory, batch)
    return step


def decode(training: Any, program: Any) -> Recorded:
    """A token for data.batch_size sequences, lowered with caches of data.seq_len tokens."""
    state, data = find("abstract_state")(training), program.config.data
    rows = {layer: table.rows for layer, table in state.memory.items()}
    weights = find("Weights")(state.params, state.router_bias, rows)
    where = find("session_shardings")(program, weights, data.batch_size)
    session = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda w: find("start")(program, w, data.batch_size, data.seq_len), weights),
        where,
    )
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((data.batch_size, 1), np.int32, sharding=everywhere)
    valid = jax.ShapeDtypeStruct((data.batch_size,), np.int32, sharding=everywhere)
    with recorded() as made:
        find("jit_extend")(program, where)
    (step,) = made
    step(weights, tokens, valid, session)
    return step


def served(training: Any, program: Any) -> Iterator[tuple[str, Recorded]]:
    """(name, function) of everything that the engine compiles, each as soon as it is lowered."""
    state, config = find("abstract_state")(training), program.config
    weights = find("Weights")(state.params, state.router_bias, {})
    serve, engram = config.serve, config.model.engram
    everywhere = NamedSharding(program.mesh, PartitionSpec())

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    with recorded() as made:
        steps = find("EngineSteps")(program, serve)

    def last() -> Recorded:
        (found,) = [step for step in made if step.lowered is not None]
        return found

    def call(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, Recorded]:
        for step in made:
            step.lowered = None
        return function(*args, **kwargs), last()

    cache, step = call(steps.fresh, weights)
    yield "fresh", step
    shapes = {
        "decode": (serve.sequences, 1),
        "prefill": (serve.prefill_sequences, serve.prefill_chunk),
    }
    for kind, (size, length) in shapes.items():
        numbers = array(np.int32, size, find("PAGES_FROM") + steps.pages_each)
        batch = find("StepBatch")(numbers, array(np.uint32, size), array(np.float32, size, 2))
        tokens = None if kind == "decode" else array(np.int32, size, length)
        (flow, cache), step = call(steps.first, weights, cache, batch, tokens)
        yield f"{kind}.first", step
        for i, layer in enumerate(steps.layers, 1):
            rows = array(np.dtype(engram.table_dtype), size, length, engram.heads, engram.dim)
            (flow, cache), step = call(method(steps, "span"), i, weights, cache, batch, flow, rows)
            yield f"{kind}.layer{layer}", step
        for asked in (False, True):
            targets = array(np.int32, size, length) if asked and kind == "prefill" else None
            (_, cache), step = call(
                steps.sample, weights, cache, batch, flow, targets, logprobs=asked
            )
            yield f"{kind}.sample{'.logprobs' if asked else ''}", step
    pages, slot = array(np.int32, steps.pages_each), array(np.int32)
    kept, step = call(method(steps, "swap_out"), cache, slot, pages)
    yield "swap_out", step
    _, step = call(method(steps, "swap_in"), cache, slot, pages, kept, slot)
    yield "swap_in", step


def main(folder: Path, cases: list[str]) -> None:
    import engram_jax

    if Path(engram_jax.__file__).parent.parent != Path.cwd():
        raise SystemExit(f"engram_jax is {engram_jax.__file__}, not the one of {Path.cwd()}")
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        programs(case, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
