"""Small diffusion transformers in the styles that projects write: what is written otherwise must be read alike.

``build`` makes a model in eval mode and the inputs of its calls; the conditioning is the same objects at every call::

    model, inputs = build("looped_step")
    args, kwargs = inputs(0.5)
    sample = model(*args, **kwargs)

Every model is ``begin``, then for each block ``glue`` and ``step``, then ``finish``, all on one state: a dictionary
whose ``"x"`` is the tuple of the streams. So a test can run some blocks and put something else in place of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 32
HEADS = 2
CHANNELS = 4
TEXT_WIDTH = 24
TEXT_TOKENS = 7

State = dict[str, Any]
Inputs = Callable[[float], tuple[tuple[Any, ...], dict[str, Any]]]
Case = Callable[[], tuple["Model", Inputs]]

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Put a function that makes a model and its inputs among the cases, by its name."""
    CASES[function.__name__] = function
    return function


def build(name: str) -> tuple[Model, Inputs]:
    """The model of a case in eval mode, and ``inputs(t)``: args and kwargs of the call at time t in 0..1."""
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    return model.eval(), inputs


def image_inputs(extra: Callable[[torch.Generator], dict[str, Any]] | None = None) -> Inputs:
    """Latents on the straight line between two noises, the time, a text; and what `extra` makes once."""
    generator = torch.Generator().manual_seed(1)
    first, last = (torch.randn(1, CHANNELS, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    more = extra(generator) if extra else {}

    def inputs(t: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((1 - t) * first + t * last, torch.full((1,), t), text), dict(more)

    return inputs


# The parts that all models share.


def sinusoid(t: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[..., None] * 1000.0 * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TimeMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.up.weight.data *= 0.25

    def forward(self, t: Tensor) -> Tensor:
        return self.down(F.silu(self.up(sinusoid(t, WIDTH))))


class Attention(nn.Module):
    def __init__(self, context_width: int = WIDTH) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(context_width, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        query = self.query(x).view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
        pair = self.key_value(x if context is None else context).chunk(2, -1)
        key, value = (z.view(batch, -1, HEADS, width // HEADS).transpose(1, 2) for z in pair)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH * factor)
        self.down = nn.Linear(WIDTH * factor, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention and an MLP, modulated by a condition per sample or per token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention()
        self.mlp = MLP()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def six(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then those of the MLP."""
        values = self.modulation(F.silu(condition))
        return (values[:, None] if values.ndim == 2 else values).chunk(6, -1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(condition)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Model(nn.Module):
    """An image transformer without blocks: what comes before them and what comes after them."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.depth = depth
        self.project = nn.Linear(CHANNELS, WIDTH)
        self.time = TimeMLP()
        self.text = nn.Linear(TEXT_WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.final = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, CHANNELS)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        x = self.project(latent.flatten(2).transpose(1, 2))
        condition = self.time(t) + self.text(text).mean(1)
        return {"x": (x,), "condition": condition, "text": text, "shape": latent.shape}

    def glue(self, i: int, state: State) -> State:
        """What happens to the streams before block i and belongs to no block."""
        return state

    def step(self, i: int, state: State) -> State:
        """Block i."""
        raise NotImplementedError

    def finish(self, state: State) -> Tensor:
        shift, scale = self.final(F.silu(state["condition"]))[:, None].chunk(2, -1)
        out = self.out(modulate(self.norm(state["x"][0]), shift, scale))
        return out.transpose(1, 2).reshape(state["shape"])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        state = self.begin(*args, **kwargs)
        for i in range(self.depth):
            state = self.step(i, self.glue(i, state))
        return self.finish(state)


class Plain(Model):
    """One list of blocks."""

    def __init__(self, depth: int = 8, block: type[nn.Module] = Block) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def step(self, i: int, state: State) -> State:
        return {**state, "x": (self.blocks[i](state["x"][0], state["condition"]),)}


# How blocks are called.


class Checkpointed(Plain):
    def step(self, i: int, state: State) -> State:
        x = checkpoint(self.blocks[i], state["x"][0], state["condition"], use_reentrant=False)
        return {**state, "x": (x,)}


@case
def checkpointed() -> tuple[Model, Inputs]:
    """Activation checkpointing left on around each block."""
    return Checkpointed(10), image_inputs()


class Looped(Model):
    def __init__(self) -> None:
        super().__init__(12)
        self.block = Block()
        self.rounds = nn.Embedding(12, WIDTH)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        state = super().begin(latent, t, text)
        return {**state, "first": state["x"][0]}

    def step(self, i: int, state: State) -> State:
        condition = state["condition"] + self.rounds.weight[i]
        return {**state, "x": (self.block(state["x"][0] + 0.1 * state["first"], condition),)}


@case
def looped_step() -> tuple[Model, Inputs]:
    """One block, run twelve times with an embedding of the round; each round sees the first stream again."""
    return Looped(), image_inputs()


class StackedWeights(Model):
    def __init__(self) -> None:
        super().__init__(10)
        self.qkv = self.stacked(3 * WIDTH, WIDTH)
        self.proj = self.stacked(WIDTH, WIDTH)
        self.up = self.stacked(2 * WIDTH, WIDTH)
        self.down = self.stacked(WIDTH, 2 * WIDTH)
        self.gates = self.stacked(2 * WIDTH, WIDTH)

    def stacked(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(self.depth, rows, columns) / columns**0.5)

    def step(self, i: int, state: State) -> State:
        (x,) = state["x"]
        batch, tokens, width = x.shape
        gate1, gate2 = F.linear(F.silu(state["condition"]), self.gates[i])[:, None].chunk(2, -1)
        three = F.linear(F.layer_norm(x, (width,)), self.qkv[i]).chunk(3, -1)
        query, key, value = (z.view(batch, tokens, HEADS, -1).transpose(1, 2) for z in three)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1 * F.linear(attended, self.proj[i])
        hidden = F.gelu(F.linear(F.layer_norm(x, (width,)), self.up[i]))
        return {**state, "x": (x + gate2 * F.linear(hidden, self.down[i]),)}


@case
def stacked_weights() -> tuple[Model, Inputs]:
    """Each weight of all blocks is one tensor, indexed in a loop."""
    return StackedWeights(), image_inputs()


class TorchEncoder(Model):
    def __init__(self) -> None:
        super().__init__(8)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        state = super().begin(latent, t, text)
        return {**state, "x": (torch.cat([state["condition"][:, None], state["x"][0]], 1),)}

    def step(self, i: int, state: State) -> State:
        return {**state, "x": (self.encoder.layers[i](state["x"][0]),)}

    def finish(self, state: State) -> Tensor:
        return super().finish({**state, "x": (state["x"][0][:, 1:],)})

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        state = self.begin(latent, t, text)
        return self.finish({**state, "x": (self.encoder(state["x"][0]),)})


@case
def torch_encoder() -> tuple[Model, Inputs]:
    """torch's own encoder, whose layers are one fused operator each in eval mode."""
    return TorchEncoder(), image_inputs()


class AutocastBlock(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float32, enabled=False):
            shift1, scale1, gate1, shift2, scale2, gate2 = self.six(condition.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attended = self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate1 * attended.float()
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


@case
def autocast_block() -> tuple[Model, Inputs]:
    """Blocks that begin with a context: the modulation in float32, the attention in bfloat16."""
    return Plain(8, AutocastBlock), image_inputs()


# How blocks are held.


class NestedInList(Model):
    def __init__(self) -> None:
        super().__init__(8)
        self.net = nn.ModuleList([self.project, nn.ModuleList(Block() for _ in range(8)), self.out])
        del self.project, self.out

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        x = self.net[0](latent.flatten(2).transpose(1, 2))
        return {"x": (x,), "condition": self.time(t) + self.text(text).mean(1), "shape": latent.shape}

    def step(self, i: int, state: State) -> State:
        return {**state, "x": (self.net[1][i](state["x"][0], state["condition"]),)}

    def finish(self, state: State) -> Tensor:
        shift, scale = self.final(F.silu(state["condition"]))[:, None].chunk(2, -1)
        out = self.net[2](modulate(self.norm(state["x"][0]), shift, scale))
        return out.transpose(1, 2).reshape(state["shape"])


@case
def nested_in_list() -> tuple[Model, Inputs]:
    """Everything in one list: what embeds, the list of blocks, the head."""
    return NestedInList(), image_inputs()


class Part(nn.Module):
    """Self-attention, cross-attention or an MLP, with a modulation of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.inner = MLP() if kind == "mlp" else Attention(TEXT_WIDTH if kind == "cross" else WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, -1)
        hidden = modulate(self.norm(x), shift, scale)
        return x + gate * (self.inner(hidden, text) if self.kind == "cross" else self.inner(hidden))


class PartsBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Part("self"), Part("cross"), Part("mlp")])

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, text)
        return x


class DictOfLists(Model):
    def __init__(self) -> None:
        super().__init__(8)
        self.blocks = nn.ModuleDict({f"block{i}": PartsBlock() for i in range(8)})

    def step(self, i: int, state: State) -> State:
        x = self.blocks[f"block{i}"](state["x"][0], state["condition"], state["text"])
        return {**state, "x": (x,)}


@case
def dict_of_lists() -> tuple[Model, Inputs]:
    """Blocks in a ModuleDict, each with a ModuleList of its three parts."""
    return DictOfLists(), image_inputs()


# What blocks write.


class InPlaceBlock(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(condition)
        x.addcmul_(gate1, self.attention(modulate(self.norm1(x), shift1, scale1)))
        x.addcmul_(gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x


@case
def inplace_drop() -> tuple[Model, Inputs]:
    """Blocks that write their stream in place and drop what the write returns."""
    return Plain(8, InPlaceBlock), image_inputs()


class JointBlock(nn.Module):
    """Two streams with an attention over both, and a block for each."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.image = Block()
        self.text = Block()
        self.joint = Attention()

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.joint(torch.cat([text, image], 1))
        tokens = text.shape[1]
        if self.in_place:
            text += joined[:, :tokens]
            image += joined[:, tokens:]
            image += 0.3 * self.image(image, condition)
            text += 0.3 * self.text(text, condition)
        else:
            text = text + joined[:, :tokens]
            image = image + joined[:, tokens:]
            image = image + 0.3 * self.image(image, condition)
            text = text + 0.3 * self.text(text, condition)
        return image, text


class SingleBlock(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.block = Block()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.in_place:
            x += 0.3 * self.block(x, condition)
            return x
        return x + 0.3 * self.block(x, condition)


class TwoStacks(Model):
    def __init__(self, in_place: bool) -> None:
        super().__init__(10)
        self.double_blocks = nn.ModuleList(JointBlock(in_place) for _ in range(4))
        self.single_blocks = nn.ModuleList(SingleBlock(in_place) for _ in range(6))
        self.text_stream = nn.Linear(TEXT_WIDTH, WIDTH)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        state = super().begin(latent, t, text)
        return {**state, "x": (state["x"][0], self.text_stream(text))}

    def glue(self, i: int, state: State) -> State:
        if i != len(self.double_blocks):
            return state
        image, text = state["x"]
        return {**state, "x": (torch.cat([text, image], 1),)}

    def step(self, i: int, state: State) -> State:
        if i < len(self.double_blocks):
            return {**state, "x": self.double_blocks[i](*state["x"], state["condition"])}
        return {**state, "x": (self.single_blocks[i - len(self.double_blocks)](state["x"][0], state["condition"]),)}

    def finish(self, state: State) -> Tensor:
        return super().finish({**state, "x": (state["x"][0][:, TEXT_TOKENS:],)})


@case
def inplace_two() -> tuple[Model, Inputs]:
    """Two streams, then both in one, every stream written in place: two stacks with a join between."""
    return TwoStacks(in_place=True), image_inputs()


@case
def outplace_two() -> tuple[Model, Inputs]:
    """The same, out of place."""
    return TwoStacks(in_place=False), image_inputs()


# What the streams are.


class HyperConnections(Plain):
    def __init__(self) -> None:
        super().__init__(8)
        self.read = nn.ParameterList(nn.Parameter(torch.randn(3) * 0.3 + 0.3) for _ in range(8))
        self.write = nn.ParameterList(nn.Parameter(torch.randn(3) * 0.2 + 0.5) for _ in range(8))
        self.mix = nn.ParameterList(nn.Parameter(torch.eye(3) + 0.05 * torch.randn(3, 3)) for _ in range(8))

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        state = super().begin(latent, t, text)
        return {**state, "x": (state["x"][0][:, None].expand(-1, 3, -1, -1).contiguous(),)}

    def step(self, i: int, state: State) -> State:
        (streams,) = state["x"]
        x = torch.einsum("bknd,k->bnd", streams, self.read[i])
        added = self.blocks[i](x, state["condition"]) - x
        streams = torch.einsum("bknd,kj->bjnd", streams, self.mix[i])
        return {**state, "x": (streams + self.write[i][None, :, None, None] * added[:, None],)}

    def finish(self, state: State) -> Tensor:
        return super().finish({**state, "x": (state["x"][0].sum(1),)})


@case
def hyper_connections() -> tuple[Model, Inputs]:
    """Three residual streams in one 4-D tensor, mixed between the blocks, which see one sum of them."""
    return HyperConnections(), image_inputs()


class EncoderDecoder(Model):
    def __init__(self) -> None:
        super().__init__(12)
        self.encoder = nn.ModuleList(Block() for _ in range(8))
        self.decoder = nn.ModuleList(Block() for _ in range(4))
        self.again = nn.Linear(CHANNELS, WIDTH)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        return {**super().begin(latent, t, text), "latent": latent}

    def glue(self, i: int, state: State) -> State:
        if i != len(self.encoder):
            return state
        per_token = F.silu(state["x"][0] + state["condition"][:, None])
        return {**state, "per_token": per_token, "x": (self.again(state["latent"].flatten(2).transpose(1, 2)),)}

    def step(self, i: int, state: State) -> State:
        if i < len(self.encoder):
            return {**state, "x": (self.encoder[i](state["x"][0], state["condition"]),)}
        return {**state, "x": (self.decoder[i - len(self.encoder)](state["x"][0], state["per_token"]),)}


@case
def encoder_decoder() -> tuple[Model, Inputs]:
    """An encoder makes a condition per token for a decoder that begins with the noisy latent again."""
    return EncoderDecoder(), image_inputs()


# What stands beside the blocks.


class SideNetwork(Plain):
    def __init__(self) -> None:
        super().__init__(8, InPlaceBlock)
        self.layers = nn.ModuleList(MLP(4) for _ in range(5))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(5))

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> State:
        state = super().begin(latent, t, text)
        condition = state["condition"]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            condition = condition + layer(norm(condition))
        return {**state, "condition": condition}


@case
def side_network() -> tuple[Model, Inputs]:
    """A stack that sees the condition only, beside blocks that write in place."""
    return SideNetwork(), image_inputs()


class TextEncoder(Plain):
    def __init__(self) -> None:
        super().__init__(6)
        self.encoder = nn.ModuleList(Block() for _ in range(6))
        self.embed = nn.Linear(TEXT_WIDTH, WIDTH)

    def begin(self, latent: Tensor, t: Tensor, text: Tensor, long_text: Tensor) -> State:
        hidden, condition = self.embed(long_text), torch.zeros(1, WIDTH)
        for block in self.encoder:
            hidden = block(hidden, condition)
        state = super().begin(latent, t, text)
        return {**state, "condition": state["condition"] + hidden.mean(1)}


@case
def text_encoder() -> tuple[Model, Inputs]:
    """An encoder of the text within the forward: more work than the blocks, and the same at every call."""
    return TextEncoder(), image_inputs(
        lambda generator: {"long_text": torch.randn(1, 300, TEXT_WIDTH, generator=generator)}
    )


class WritesItsText(Plain):
    def begin(self, latent: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> State:
        text[~mask] = 0
        return super().begin(latent, t, text)


@case
def writes_condition() -> tuple[Model, Inputs]:
    """The forward masks its text in place: the same content after every call."""
    return WritesItsText(), image_inputs(lambda _: {"mask": torch.arange(TEXT_TOKENS)[None] < 5})


class IntegerTime(Plain):
    def begin(self, latent: Tensor, t: int, text: Tensor) -> State:
        return super().begin(latent, torch.full((latent.shape[0],), t / 1000), text)


@case
def integer_time() -> tuple[Model, Inputs]:
    """The time is a Python integer."""
    inputs = image_inputs()

    def with_integer(t: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (latent, _, text), kwargs = inputs(t)
        return (latent, round(1000 * t), text), kwargs

    return IntegerTime(), with_integer


# What the inputs look like, in one graph and with each block in graphs of its own.


class TokenTime(Plain):
    """A time for each token: those of a reference picture, which stand behind the others, have no noise."""

    def begin(self, latent: Tensor, t: Tensor, text: Tensor, reference: Tensor) -> State:
        state = super().begin(torch.cat([latent, reference], 2), t[:, 0], text)
        condition = self.time(t) + self.text(text).mean(1)[:, None]
        return {**state, "condition": condition, "shape": latent.shape}

    def finish(self, state: State) -> Tensor:
        x = state["x"][0][:, : state["shape"][2] * state["shape"][3]]
        return super().finish({**state, "x": (x,), "condition": state["condition"].mean(1)})


class ListedLatents(Plain):
    """The batch is a list of latents."""

    def begin(self, latent: list[Tensor], t: Tensor, text: Tensor) -> State:
        return super().begin(torch.cat(latent), t, text)

    def finish(self, state: State) -> list[Tensor]:
        return list(super().finish(state).chunk(2))


class BrokenBlock(Block):
    """A block with a graph break between attention and MLP."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(condition)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        torch._dynamo.graph_break()
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def with_token_time(inputs: Inputs) -> Inputs:
    reference = inputs(1.0)[0][0]

    def call(t: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (latent, time, text), kwargs = inputs(t)
        times = torch.cat([time.expand(64), torch.zeros(64)])[None]
        return (latent, times, text, reference), kwargs

    return call


def with_listed_latents(inputs: Inputs) -> Inputs:
    def call(t: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (latent, time, text), kwargs = inputs(t)
        return ([latent, -latent.flip(-1)], time.expand(2), text), kwargs

    return call


@case
def token_time() -> tuple[Model, Inputs]:
    """A time for each of 128 tokens, half of which are a reference picture's."""
    return TokenTime(), with_token_time(image_inputs())


@case
def token_time_in_pieces() -> tuple[Model, Inputs]:
    """The same, with a graph break in each block."""
    return TokenTime(8, BrokenBlock), with_token_time(image_inputs())


@case
def listed_latents() -> tuple[Model, Inputs]:
    """Two latents in a list, one text for both."""
    return ListedLatents(), with_listed_latents(image_inputs())


@case
def listed_latents_in_pieces() -> tuple[Model, Inputs]:
    """The same, with a graph break in each block."""
    return ListedLatents(8, BrokenBlock), with_listed_latents(image_inputs())
