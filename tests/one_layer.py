"""One layer of a policy, executed by the runtime step by step on tensors of a test's choice, without a model."""

import torch

from policies import Step, plan_layer
from policies.model import LayerShape, ModelShape
from runtime.arena import Arena
from runtime.bound import Bound
from runtime.call import Call
from runtime.executor import Executor
from runtime.methods import method_of
from runtime.mover import Mover
from runtime.rotary import Rotary, Rotation


def one_layer_model(heads, kv_heads, head_dim):
    """A model of one full-attention layer in fp32."""
    sizes = {"qkv_params": 1, "out_params": 1, "mlp_params": 1, "mlp_active_params": 1}
    layer = LayerShape(kind="full", heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim, **sizes)
    return ModelShape(
        name="tiny", hidden_dim=16, vocab_size=8, max_positions=4096, layers=(layer,), embedding_params=1,
        head_params=1, params=5, dtype="fp32", kv_dtype="fp32",
    )  # fmt: skip


def angles(pads, tokens, head_dim):
    """Rotation of each token, fp64 (batch, tokens, head_dim / 2): positions count from a row's first real token."""
    position = (torch.arange(tokens)[None] - torch.tensor(pads)[:, None]).clamp(min=0).double()
    return position[..., None] * 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)


def turned(x, theta):
    """x (batch, heads, tokens, head_dim) in fp64, its halves turned as complex numbers by theta, see `angles`."""
    first, second = x.double().chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(theta), theta)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


class OneLayer:
    """q (batch, heads, tokens, head_dim), k and v (batch, kv_heads, tokens, head_dim): rotated, for all steps.

    The first `prompt` tokens are the prompt, of which `pads` are padding in each row. `chunked`: it comes in pieces.
    Everything runs where q is.
    """

    def __init__(self, policy, q, k, v, *, prompt, pads=None, chunked=False, softcap=None, sinks=None):
        self.policy, self.q, self.k, self.v, self.prompt = policy, q, k, v, prompt
        self.batch, heads, self.tokens, head_dim = q.shape
        self.shape = one_layer_model(heads, k.shape[1], head_dim)
        self.softcap, self.sinks = softcap, sinks
        real = None if pads is None else torch.arange(self.tokens)[None] >= torch.tensor(pads)[:, None]
        self.seen = None if real is None else real.to(q.device)
        self.mover = Mover()
        self.arena, self.executor = Arena(q.device, self.batch), Executor(q.device, self.mover)
        theta = angles(pads or [0] * self.batch, self.tokens, head_dim).repeat(1, 1, 2)
        self.rotary = Rotary(self.tokens, Rotation())
        self.rotary.extend(theta.cos().float().to(q.device), theta.sin().float().to(q.device))
        done = prompt - 1 if chunked else 0
        last = Step(prompt_tokens=prompt, past_tokens=done, new_tokens=prompt - done)
        kept = self._plan(Step.decoding(prompt, self.tokens - prompt)).buffers
        names = {b.name for b in kept}
        self.arena.allocate(0, kept)
        self.arena.allocate(0, [b for b in self._plan(last).buffers if b.name not in names or b.ring], passing=True)

    def _plan(self, step):
        return plan_layer(self.policy, self.shape, step, 0)

    def step(self, past, new):
        """Run one step; its call, with `out` and `counts`."""
        step = Step(prompt_tokens=self.prompt, past_tokens=past, new_tokens=new)
        plan, at = self._plan(step), slice(past, past + new)
        assert plan.policy == self.policy, "the plan fell back on the dense cache"
        mask = None if self.seen is None else self.seen[:, None, None, : past + new]
        call = Call(
            shape=self.shape.layers[0], step=step, state=self.arena.tensors(0, plan.buffers), q=self.q[:, :, at],
            new_k=self.k[:, :, at], new_v=self.v[:, :, at], mask=mask, scale=self.q.shape[3] ** -0.5,
            softcap=self.softcap, sinks=self.sinks, rotary=self.rotary,
        )  # fmt: skip
        self.executor.run(Bound(plan, method_of(self.policy), self.arena, 0), call)
        return call

    def prefill(self, *chunks):
        """Run the prompt, in pieces of these sizes or at once; the last call."""
        assert sum(chunks, 0) in (0, self.prompt)
        past = 0
        for new in chunks or (self.prompt,):
            call = self.step(past, new)
            past += new
        return call

    def decode(self):
        """Run all steps after the prompt, one token each."""
        for past in range(self.prompt, self.tokens):
            yield past, self.step(past, 1)


def attention(q, k, v, softcap=None, sink=None):
    """What one query (head_dim) reads from keys and values (tokens, head_dim), in fp64."""
    logits = k.double() @ q.double() * q.shape[0] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sink is not None:
        logits = torch.cat([logits, sink.double().view(1)])
    return torch.softmax(logits, 0)[: len(k)] @ v.double()


def drawn(batch, heads, kv_heads, tokens, head_dim, seed):
    """Random q, k before its rotation, and v, fp32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, tokens, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads)]
