"""The inference engine: continuous batching, with the memory's rows fetched ahead.

One iteration (`step`):

    device                                host
    blocks before the first Engram layer  read the tokens sampled by the last iteration, end
                                          finished sequences, hash, request all layers' rows
    Engram layer, blocks after it, ...    rows of the next Engram layer
    sample
    a chunk of prompts, likewise          (its rows were requested at the end of the last iteration)

The tokens of an iteration are read while the next one's first blocks run: these need nothing from
the host. Tokens depend neither on the other sequences of a batch (serve/engine_steps.py) nor on
where rows are stored.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing import drawable_ids
from engram_jax.config.errors import UserError
from engram_jax.model.program import Program, Weights
from engram_jax.serve import scoring
from engram_jax.serve.device_state import DeviceState
from engram_jax.serve.engine_steps import PAGES_FROM, EngineSteps, Sampled, StepBatch
from engram_jax.serve.logit_rules import LogitRules, check_rules, no_adjustments
from engram_jax.serve.pages import Pages
from engram_jax.serve.prefetch import Prefetch
from engram_jax.serve.request import (
    Completion,
    Delta,
    Finish,
    Logprob,
    PromptLogprobs,
    SamplingParams,
)
from engram_jax.serve.row_fetch import LayerMemory
from engram_jax.serve.scheduler import Schedule
from engram_jax.serve.scheduler import Sequence as Running
from engram_jax.serve.text_stream import TextStream
from engram_jax.serve.warm_up import ROUNDS, Announced
from engram_jax.sharding.rules import P


@dataclasses.dataclass
class _Flight:
    """A dispatched batch whose results have not been read.

    rows: (row of the batch, sequence, tokens before, tokens computed, whether the sampled token is
      the sequence's next one).
    following: log-probabilities of `next_ids`, where a prompt has them.
    """

    sampled: Sampled
    rows: list[tuple[int, Running, int, int, bool]]
    following: jax.Array | None = None


class Engine:
    """One model, served. Only one thread may call it.

    steps: the compiled model, which engines may share; its `serve` is this engine's configuration.
    weights.rows are not used. memory: by Engram layer id; switched-off layers need none.
    tokenizer: None = texts stay empty. eos_id: ends a sequence; None or negative = nothing does.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        memory: Mapping[str, LayerMemory],
        steps: EngineSteps | None = None,
        tokenizer: Any = None,
        eos_id: int | None = None,
    ):
        if steps is None:
            drawable = drawable_ids(tokenizer, program.config.tokenizer.vocab_size)
            steps = EngineSteps(program, program.config.serve, drawable)
        self._steps = steps
        self.serve, self._drawable = self._steps.serve, self._steps.drawable
        self.program, self.tokenizer, self.eos_id = program, tokenizer, eos_id
        self.name, self.capacity = program.config.name, self.serve.capacity
        self._weights = dataclasses.replace(weights, rows={})
        self._prefetch = Prefetch(program, memory, self._steps)
        pages = Pages(self._steps.page_count, self.serve.page)
        chunk = self._steps.shared_chunk
        self._schedule = Schedule(self.serve.sequences, pages, self.serve.queue, chunk)
        self._replicated = NamedSharding(program.mesh, P())
        self._state = DeviceState(self._steps, self._weights, self._replicated)
        self._numbers = itertools.count()
        self._open: dict[int, Running] = {}
        self._flights: list[_Flight] = []
        self._ahead: tuple[np.ndarray, Any, Any] | None = None  # of prompts: tokens, rows, asked
        self._deltas: list[Delta] = []
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens"), 0)

    # Requests

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, request: Hashable = None
    ) -> int:
        """Queue a sequence; returns its number.

        request: what has several sequences gives the same for all of them; it takes turns with
        others (serve/waiting.py).

        Raises UserError for one that can never be served and QueueFullError while too many wait.
        """
        self.check(prompt, params)
        text = None
        if self.tokenizer is not None:
            how = {
                "include": params.include_stop,
                "skip_special_tokens": params.skip_special_tokens,
            }
            text = TextStream[Any](self.tokenizer, params.stop, prompt, **how)
        number = next(self._numbers)
        tokens = np.asarray(prompt, np.int32)
        sequence = Running(number, tokens, params, self._prefetch.empty_history(), text)
        sequence.request, sequence.salt = request, params.cache_salt
        if params.prompt_logprobs:  # a token is computed where its logits are wanted
            sequence.shares = params.prompt_logprobs_from - 1
        self._schedule.submit(sequence)
        self._open[number] = sequence
        return number

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises UserError for a request that can never be served."""
        vocab = self.program.config.tokenizer.vocab_size
        if not len(prompt):
            raise UserError("prompt: must have at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise UserError(f"prompt: token id {bad}: must be from 0 to {vocab - 1}")
        if len(prompt) + params.max_tokens > self.capacity:
            raise UserError(
                f"prompt of {len(prompt)} tokens and max_tokens = {params.max_tokens}: must be at"
                f" most {self.capacity} together"
            )
        if not all(0 <= token < vocab for token in params.next_ids):
            raise UserError(f"next_ids = {params.next_ids}: must be from 0 to {vocab - 1}")
        if params.prompt_logprobs_from > len(prompt):
            raise UserError(
                f"prompt_logprobs_from = {params.prompt_logprobs_from}: must be at most the"
                f" prompt's {len(prompt)} tokens"
            )
        if params.top_k > vocab:
            raise UserError(f"top_k = {params.top_k}: must be at most {vocab}, 0 = all")
        if params.stop and self.tokenizer is None:
            raise UserError("stop: must be empty where there is no tokenizer; use stop_ids")
        check_rules(params, self.eos_id, vocab, self._drawable)

    def cancel(self, request: int) -> None:
        """End a request now; one that is unknown or has ended is left alone."""
        if request in self._open:
            self._end(self._open[request], Finish.CANCELLED)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._open or self._deltas)

    @property
    def memory_error(self) -> str:
        """The last error in reading rows of the memory; "" = none so far. Thread-safe."""
        return self._prefetch.error

    def stats(self) -> dict[str, float]:
        """Counts since the start, and the current numbers of sequences and pages."""
        schedule = self._schedule
        return {
            "running": len(schedule.running),
            "waiting": len(schedule.waiting),
            "moved_out": len(schedule.evicted),
            "free_pages": schedule.free,
            "pages": schedule.pages.total,
            "evictions": schedule.evictions,
            **schedule.prefixes.stats(),
            **self._counts,
            **self._prefetch.stats(),
        }

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        ended: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """The completion of every prompt; params: for all, or one each. Nothing else may run.
        ended: called when one has ended."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        for prompt, own in zip(prompts, each, strict=True):
            self.check(prompt, own)
        deltas: dict[int, list[Delta]] = {}
        rest = list(zip(prompts, each, strict=True))[::-1]
        try:
            while rest or self.busy:
                while rest and len(self._schedule.waiting) < self.serve.queue:
                    prompt, own = rest.pop()
                    deltas[self.submit(prompt, own)] = []
                for delta in self.step():
                    if delta.request in deltas:  # else the end of one cancelled earlier
                        deltas[delta.request].append(delta)
                        if delta.finish is not None:
                            ended()
        finally:  # if interrupted, they would run on during the next call
            for number in deltas:
                self.cancel(number)
        return [Completion.of(d) for d in deltas.values()]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        """The deltas of one prompt. Nothing else may run; stopping early cancels it."""
        number = self.submit(prompt, params)
        try:
            while self.busy:
                yield from (delta for delta in self.step() if delta.request == number)
        finally:
            self.cancel(number)

    def warm_up(self, tell: Callable[[str], None] = lambda line: None) -> None:
        """Compile what ordinary requests need, so that the first one does not have to wait. tell:
        is given a line for each program."""
        steps = self._steps
        self._steps = cast(EngineSteps, Announced(steps, tell))
        try:
            for params in ROUNDS:
                self.generate([[0]] * len(params), params)
        finally:
            self._steps = steps
        if steps.units:
            self._state.keep_tails([])
            self._state.restore_tails([])

    # One iteration

    def step(self) -> list[Delta]:
        """Run one iteration; returns what it added to the requests."""
        schedule = self._schedule
        self._counts["steps"] += 1
        ready, leaving = schedule.room_for_next()
        for sequence in leaving:
            self._evict(sequence)
        batch, flow = self._begin_decoding(ready)
        self._read()
        self._decode(ready, batch, flow)
        self._prefill()
        for sequence in schedule.readmit():
            self._swap_in(sequence)
        found = [*(s for s in schedule.admit() if s.shared), *schedule.adopt()]
        if found:  # they go on behind what others have computed
            self._state.restore_tails([(s.slot, s.shared[-1].row) for s in found])
        self._ask_for_prompts()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _begin_decoding(self, ready: list[Running]) -> tuple[Any, Any]:
        """Run the first span, whose tokens are already on the device."""
        if not ready:
            return None, None
        for sequence in ready:
            self._schedule.grow(sequence)
        batch = self._batch(self.serve.sequences, [(s.slot, s, 1) for s in ready])
        flow, self._state.cache = self._steps.first(self._weights, self._state.cache, batch, None)
        for sequence in ready:
            sequence.computed += 1
        return batch, flow

    def _decode(self, ready: list[Running], batch: Any, flow: Any) -> None:
        """Run the other spans, for the tokens that the host has now read."""
        rows = [(s.slot, s, 1) for s in ready if s.finish is None]
        if not rows:
            return
        tokens = np.zeros((self.serve.sequences, 1), np.int32)
        for slot, sequence, _ in rows:
            tokens[slot, 0] = sequence.generated[-1]
        asked = self._prefetch.ask(tokens, rows)
        self._run(batch, flow, rows, asked)

    def _ask_for_prompts(self) -> None:
        """Request the rows of the tokens that `_prefill` computes in the next step."""
        shape = (self.serve.prefill_sequences, self.serve.prefill_chunk)
        chunk = self._schedule.prefilling(shape[0])
        tokens = np.zeros(shape, np.int32)
        rows = []
        for row, sequence in enumerate(chunk):
            part = sequence.prompt[sequence.computed :][: shape[1]]
            tokens[row, : len(part)] = part
            rows.append((row, sequence, len(part)))
        self._ahead = tokens, rows, self._prefetch.ask(tokens, rows)

    def _prefill(self) -> None:
        """Run the next chunk of some prompts through all spans."""
        if self._ahead is None:
            return
        tokens, rows, asked = self._ahead
        rows = [(row, s, count) for row, s, count in rows if s.slot >= 0]  # not ended, not evicted
        if not rows:
            return
        targets, listed = None, 0
        if scored := [s for _, s, count in rows if scoring.is_scored(s, count)]:
            targets = scoring.targets(tokens.shape, rows)
            listed = scoring.listed(scored, self._steps.alternatives)
        batch = self._batch(len(tokens), rows)
        device_tokens = jax.device_put(tokens, self._replicated)
        flow, self._state.cache = self._steps.first(
            self._weights, self._state.cache, batch, device_tokens
        )
        for _, sequence, count in rows:
            sequence.computed += count
            self._counts["prompt_tokens"] += count
        self._run(batch, flow, rows, asked, targets, listed)
        self._keep([s for _, s, _ in rows if s.finish is None])

    def _run(
        self,
        batch: StepBatch,
        flow: Any,
        rows: Any,
        asked: Any,
        targets: Any = None,
        listed: int = 0,
    ) -> None:
        """Run all spans after the first, and the sampler."""
        steps, weights = self._steps, self._weights
        self._prefetch.advance(asked, rows)
        for i, layer in enumerate(steps.layers, 1):
            got, errors = self._prefetch.rows(asked, layer, rows, flow.x)
            for row, sequence, _ in rows:
                if row in errors and sequence.finish is None:
                    self._end(sequence, Finish.ERROR, errors[row])
            signs = asked.signs.get(layer)
            if signs is not None:
                signs = jax.device_put(signs, self._replicated)
            flow, self._state.cache = steps.span(
                i, weights, self._state.cache, batch, flow, got, signs
            )
        alive = [(row, s, count) for row, s, count in rows if s.finish is None]
        ruled = [(row, s) for row, s, _ in alive if s.params.adjusts and not s.prefilling]
        logprobs = any(s.params.logprobs is not None for _, s, _ in alive)
        sampled, self._state.cache = steps.sample(
            weights,
            self._state.cache,
            batch,
            flow,
            targets,
            logprobs=logprobs or bool(ruled),
            listed=listed,
        )
        following = scoring.next_ids(len(batch.seed), [(row, s) for row, s, _ in alive])
        if following is not None:
            following = steps.following(sampled.logits, jax.device_put(following, self._replicated))
        if ruled:
            sampled, self._state.cache = steps.redraw(
                self._state.cache, batch, sampled, self._rules(len(batch.seed), ruled)
            )
        flight = _Flight(sampled, [], following)
        for row, sequence, count in alive:
            done = not sequence.prefilling
            sequence.pending = done and sequence.params.max_tokens > 0
            flight.rows.append((row, sequence, sequence.computed - count, count, done))
        self._flights.append(flight)

    def _rules(self, size: int, ruled: list[tuple[int, Running]]) -> Any:
        most = self._steps.entries
        made = no_adjustments(size, most, self.program.config.tokenizer.vocab_size)
        for row, s in ruled:
            if s.rules is None:  # only now: hundreds may wait
                s.rules = LogitRules(s.params, s.prompt, self.eos_id, most)
            s.rules.fill(row, made, s.generated)
        return jax.device_put(made, self._replicated)

    def _batch(self, size: int, rows: Any) -> StepBatch:
        """rows: (row of the batch, sequence, tokens now) -> the arrays the compiled steps take."""
        steps = self._steps
        numbers = np.zeros((size, PAGES_FROM + steps.pages_each), np.int32)
        numbers[:, 0] = self.serve.sequences  # the sentinel slot of unused rows
        seed, levels = np.zeros(size, np.uint32), np.zeros((size, 2), np.float32)
        for row, s, count in rows:
            drawn = len(s.generated) + s.pending
            numbers[row, :PAGES_FROM] = s.slot, s.computed, count, drawn, s.params.top_k
            numbers[row, PAGES_FROM : PAGES_FROM + len(s.pages)] = s.pages
            seed[row], levels[row] = s.params.seed, (s.params.temperature, s.params.top_p)
        return StepBatch(*jax.device_put((numbers, seed, levels), self._replicated))

    # Results

    def _read(self) -> None:
        """Wait for the tokens of the last iteration and record every request's progress."""
        flights, self._flights = self._flights, []
        for flight in flights:
            sampled = flight.sampled
            tokens = np.asarray(sampled.tokens)
            own, fed, after = jax.device_get((sampled.logprobs, sampled.prompt, flight.following))
            for row, sequence, start, count, last in flight.rows:
                if sequence.finish is not None:
                    continue
                if fed is not None and sequence.params.prompt_logprobs:
                    scoring.add_prompt(sequence, fed, row, start, count)
                if last and after is not None and not sequence.generated:
                    scoring.add_next(sequence, own, after, row)
                if last:
                    self._token(sequence, int(tokens[row]), own, row)

    def _token(self, s: Running, token: int, own: Any, row: int) -> None:
        """A new token of a sequence: keep it, or end the sequence."""
        params = s.params
        if not s.pending:  # nothing but the prompt was asked for
            self._end(s, Finish.LENGTH)
            return
        s.pending = False
        self._counts["generated_tokens"] += 1
        ends = token in params.stop_ids or (token == self.eos_id and not params.ignore_eos)
        if ends and not params.include_stop:
            self._end(s, Finish.STOP, sampled=1)
            return
        s.generated.append(token)
        logprob: Logprob | None = None
        if own is not None and params.logprobs is not None:
            logprob = scoring.one(token, own, (row,), params.logprobs)
        told, text, stopped = [(token, logprob)], "", False
        if s.text is not None:
            late = len(s.generated) > params.min_tokens
            text, stopped = s.text.push(token, told[0], stops=late)
            told = s.text.listed()
        self._tell(s, told, text=text, sampled=1)
        if stopped or ends:
            self._end(s, Finish.STOP)
        elif len(s.generated) >= params.max_tokens:
            self._end(s, Finish.LENGTH)

    def _tell(self, s: Running, told: list[tuple[int, Logprob | None]], **what: Any) -> None:
        prompt, s.prompt_logprobs = s.prompt_logprobs or (), PromptLogprobs()
        tokens = tuple(token for token, _ in told)
        logprobs = tuple(logprob for _, logprob in told if logprob is not None)
        what |= {"tokens": tokens, "logprobs": logprobs, "prompt_logprobs": prompt}
        self._deltas.append(Delta(s.number, **what))

    def _end(self, s: Running, finish: Finish, error: str = "", sampled: int = 0) -> None:
        told, text, stopped = [], "", False
        if s.text is not None:
            text, stopped = s.text.flush()
            told = s.text.listed(final=True)
        if stopped and finish == Finish.LENGTH:
            finish = Finish.STOP
        s.finish = finish
        self._schedule.end(s)
        del self._open[s.number]
        self._tell(s, told, text=text, finish=finish, error=error, sampled=sampled)

    def _keep(self, sequences: list[Running]) -> None:
        """Remember what these have just computed of their prompts."""
        prefixes = self._schedule.prefixes
        made = [(s.slot, unit.row) for s in sequences if (unit := prefixes.add(s)) is not None]
        if made:
            self._state.keep_tails(made)

    def _evict(self, s: Running) -> None:
        used = self._schedule.pages.needed(s.computed)
        s.saved = self._state.take_out(s.slot, s.pages, used)
        self._schedule.vacate(s)

    def _swap_in(self, s: Running) -> None:
        token = s.generated[-1] if s.generated else 0
        saved, s.saved = s.saved, None
        self._state.put_back(s.slot, s.pages, saved, token)

    def close(self) -> None:
        """Stop the threads that fetch rows."""
        self._prefetch.close()
