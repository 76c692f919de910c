"""What guessing costs beside the steps that verify: the draft's weights, cache and runs, or the heads' products."""

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.machine import (
    HEAD_KERNELS,
    MLP_KERNELS,
    OUT_KERNELS,
    QKV_KERNELS,
    SM,
    Cost,
    Machine,
    access_bytes,
    by_type,
    slowed,
)
from kvsim.hardware.served import Matrix, Part, ServedModel
from kvsim.scenario.setup import Setup
from kvsim.scenario.speculation import Speculation
from policies import Full, ModelShape, Step, plan_layer
from policies.plan import Compute, Tier, stored_bytes
from policies.symbolic import Polynomial, polynomial_of

ATTENTION_KERNELS = 2  # append, attend
_MOST_SEQUENCES, _PROMPT_TOKENS = 64, 2048  # up to which kernels' times, larger of bytes and FLOPs, are a line
PER_SEQUENCE, PER_PROMPT_TOKEN = range(2)
ONCE, EACH = range(2)
LAUNCH, WEIGHTS, ARITHMETIC, COLLECTIVES = range(4)
Parts = NDArray[np.float64]
FIELDS = [  # of the inner loop's state: what stands in a `Guesser`
    ("guess_parts_s", np.float64, (2, 2, 4)),
    ("guess_weight_bytes", np.int64, (2,)),
    ("guess_sent_bytes", np.int64, (2,)),
]


def guesser_of(setup: Setup) -> "Guesser | None":
    """What guessing costs a rank of a replica; None where nothing is guessed."""
    return None if setup.speculation is None else Guesser(setup.speculation, setup.rank, setup.machine())


class Guesser:
    """The costs of one rank of what guesses, a draft or heads, for a target of which one rank is `target`.

    `parts` are seconds of an iteration: (decoding or prompts, once or for each sequence or prompt token, launches
    weights arithmetic collectives). They come after the target's own work. The draft's attention is no part of them:
    what it reads differs from sequence to sequence, so it is an operation of their plans (`amounts`).
    """

    def __init__(self, speculation: Speculation, target: ModelShape, machine: Machine) -> None:
        self.speculation = speculation
        self._machine, self._target = machine, target
        self._draft: ModelShape | None = None
        self.parts: Parts = np.zeros((2, 2, 4))
        self.weight_bytes = speculation.weight_bytes(target, machine.tp)  # of the rank
        self.read_bytes = (0, 0)  # of weights, in an iteration that decodes, and more in one with prompts
        self.sent_bytes = (0, 0)  # in all-reduces, for each sequence that decodes and each token of a prompt
        if speculation.draft is not None:
            self._draft = speculation.draft.shard(machine.tp)
            self._set_draft(self._draft)
        elif speculation.method != "lookup":
            self._set_heads()
        self.parts *= machine.kernel_slowdown

    @property
    def drafts(self) -> bool:
        """Whether a model of its own guesses, with a cache of its own."""
        return self._draft is not None

    @property
    def kv_bytes_per_token(self) -> int:
        """What a further token adds to the draft's cache."""
        return 0 if self._draft is None else round(self.speculation.draft_share * self._draft.kv_bytes_per_token)

    @property
    def cost(self) -> Cost:
        """Of the draft's attention."""
        return slowed(self._attention, self._machine.kernel_slowdown)

    @property
    def _attention(self) -> Cost:
        rates, operations = self._machine.gpu.rates, self._machine.operations
        if operations is not None and self._draft is not None:
            line = operations.attention(self._draft.layers[0], self._draft.kv_dtype).decode
            return Cost(SM, 0.0, line.work_s, line.byte_s, line.byte_s, 0.0)
        return Cost(SM, 0.0, 1 / rates.attention_flops, 1 / rates.hbm_Bps, 1 / rates.hbm_Bps, 0.0)

    def amounts(self, step: Step) -> tuple[Polynomial, Polynomial, Polynomial]:
        """FLOPs and bytes of the draft's attention in one step of a sequence, and the bytes of cache that it holds.

        They are polynomials in the step's token counts. Each guess is a run of its own, over all that the cache holds.
        """
        model = self._draft
        if model is None:
            return {}, {}, {}
        runs = [step]
        if not step.prefilling:
            past, prompt = step.past_tokens, step.prompt_tokens
            guesses = range(self.speculation.guesses)
            runs = [Step(prompt_tokens=prompt, past_tokens=past + i, new_tokens=1) for i in guesses]
        flops = nbytes = 0
        for run in runs:
            plans = {shape: plan_layer(Full(), model, run, model.layers.index(shape)) for shape in set(model.layers)}
            for shape in model.layers:
                buffers = {buffer.name: buffer for buffer in plans[shape].buffers}
                for op in plans[shape].ops:
                    if isinstance(op, Compute):
                        flops = flops + op.rows.at({}) * op.flops_per_row
                        nbytes = nbytes + access_bytes((*op.reads, *op.writes), buffers, {})
        held = stored_bytes([plans[shape].buffers for shape in model.layers])[Tier.HBM]
        return self._part(flops), self._part(nbytes), self._part(held)

    def _part(self, amount: int) -> Polynomial:
        """The draft's share of an amount, each coefficient to the nearest whole one."""
        share = self.speculation.draft_share
        return {monomial: round(share * k) for monomial, k in polynomial_of(amount).items()}

    def _set_draft(self, draft: ModelShape) -> None:
        speculation, machine = self.speculation, self._machine
        share, layer_bytes = speculation.draft_share, sum(draft.layer_bytes_touched(x, 1) for x in draft.layers)
        if machine.served is not None:
            for who, rows in ((PER_SEQUENCE, _MOST_SEQUENCES), (PER_PROMPT_TOKEN, _PROMPT_TOKENS)):
                self.parts[who] = share * self._served_run(draft, machine.served, rows)
            head = self._line(machine.served.head(draft, np.array([1, _MOST_SEQUENCES])), _MOST_SEQUENCES)
            self.parts[PER_SEQUENCE] = speculation.guesses * (self.parts[PER_SEQUENCE] + share * head)
        else:
            self._set_rated_draft(draft, layer_bytes)
        self.read_bytes = (
            round(share * speculation.guesses * (layer_bytes + draft.head_bytes)),
            round(share * layer_bytes),
        )

        sent_bytes = share * 2 * draft.n_layers * machine.allreduce_bytes(draft, 1)
        self.sent_bytes = (round(speculation.guesses * sent_bytes), round(sent_bytes))

    def _set_rated_draft(self, draft: ModelShape, layer_bytes: int) -> None:
        """Parts by the parameter set's rates."""
        speculation, machine = self.speculation, self._machine
        share, rates = speculation.draft_share, machine.gpu.rates
        kernels = sum(
            QKV_KERNELS + OUT_KERNELS + ATTENTION_KERNELS + (MLP_KERNELS if x.mlp_params else 0) for x in draft.layers
        )
        work = by_type(product for x in draft.layers for product in draft.products(x))
        layers_s = machine.products_s([(dtype, 2 * params) for dtype, params in work.items()])
        one_s, many_s = (2 * draft.n_layers * machine.allreduce_s(draft, n) for n in (1, 1025))
        each_s = (many_s - one_s) / 1024
        run = np.zeros((2, 4))
        run[ONCE] = kernels * rates.launch_s, layer_bytes / rates.hbm_Bps, 0.0, one_s - each_s
        run[EACH] = 0.0, 0.0, layers_s, each_s
        head = np.zeros((2, 4))
        head[ONCE, :2] = HEAD_KERNELS * rates.launch_s, draft.head_bytes / rates.hbm_Bps
        head[EACH, ARITHMETIC] = machine.products_s([(draft.head_product, 2 * draft.head_params)])
        self.parts[PER_SEQUENCE] = share * speculation.guesses * (run + head)
        self.parts[PER_PROMPT_TOKEN] = share * run

    def _served_run(self, draft: ModelShape, served: ServedModel, rows: int) -> Parts:
        """Parts of one run of the draft by kernels: the line through those of one row and of `rows`."""
        machine, both = self._machine, np.array([1, rows])
        run = np.zeros((2, 4))
        for shape in draft.layers:
            for part in served.layer(draft, shape, both):
                run += self._line(part, rows)
        attending_s = 0.0
        if machine.operations is not None:
            attending_s = sum(
                served.elementwise_start_s + machine.operations.attention(x, draft.kv_dtype).decode.start_s
                for x in draft.layers
            )
        run[ONCE, LAUNCH] += attending_s
        one_s, many_s = (2 * draft.n_layers * machine.allreduce_s(draft, n) for n in (1, rows))
        each_s = (many_s - one_s) / (rows - 1)
        run[:, COLLECTIVES] += one_s - each_s, each_s
        return run

    @staticmethod
    def _line(part: Part, rows: int) -> Parts:
        """What one row takes once, and what each further one of so many adds to it, as arithmetic."""
        run = np.zeros((2, 4))
        each_s = (part.seconds[1] - part.seconds[0]) / (rows - 1)
        run[EACH, ARITHMETIC] = each_s
        run[ONCE, WEIGHTS] = part.by_hbm_s[0] + part.by_compute_s[0]
        run[ONCE, LAUNCH] = part.seconds[0] - run[ONCE, WEIGHTS] - each_s
        return run

    def _set_heads(self) -> None:
        """One head for each guess, applied to all candidates, since any of them may be the last that holds."""
        speculation, target, rates = self.speculation, self._target, self._machine.gpu.rates
        guesses, params = speculation.guesses, speculation.head_params(target, self._machine.tp)
        kernels = 2 if speculation.method == "medusa" else 1
        self.read_bytes = (self.weight_bytes, 0)
        if self._machine.served is not None:
            self._set_served_heads(self._machine.served, params)
            return
        flop_s = 1 / self._machine.weight_flops(target.head_product)
        once, each = self.parts[PER_SEQUENCE]
        once[LAUNCH] = guesses * kernels * rates.launch_s
        once[WEIGHTS] = self.weight_bytes / rates.hbm_Bps
        each[ARITHMETIC] = 2 * guesses * params * (speculation.candidates + 1) * flop_s

    def _set_served_heads(self, served: ServedModel, params: int) -> None:
        """Parts by kernels: each head as one matrix."""
        rows, hidden = _MOST_SEQUENCES * (self.speculation.candidates + 1), self._target.hidden_dim
        dtype = self._target.head_product
        head = served.gemm(Matrix(max(1, params // hidden), hidden, dtype, dtype), np.array([1, rows]))
        self.parts[PER_SEQUENCE] = self.speculation.guesses * self._line(head, rows)
        self.parts[PER_SEQUENCE, EACH] *= self.speculation.candidates + 1
