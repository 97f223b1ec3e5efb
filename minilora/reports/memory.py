r"""How much memory a training step needs: the formulas behind `plan`.

    held         the base, the adapters, the optimizer's states: as long as the run lasts
    activations  what the forward pass keeps for the backward pass: proportional to the tokens
    logits       what the loss needs in addition, until its gradient is known
    gradients    from the backward pass to the optimizer's step

They are not all alive at once, so `Run.phases` counts each phase on its own, and a run needs
the largest of them. The weights are counted from a model's own layers; activations are a sum over
the terms of `kept_per_block`, which follow the code of transformers' modules and of
minilora/functional.py one by one. Not counted are the padding of a caching allocator, a GPU's
context, and what libraries reserve for themselves.

docs/javascripts/memory.js has the same functions in the same order, for the calculator of the
documentation; tests/reports/test_calculator.py compares their results.

Sizes per token: H hidden, A all heads of the queries, K all heads of the keys, I the MLP's width,
V vocabulary; L blocks, r rank, c bytes of a number in the compute dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from minilora.kernels.reference.nf4 import GROUP

# Bytes of a float32.
FLOAT = 4

# Weights that are quantized while they are loaded are read through a window of this size: see
# minilora/huggingface/quantizer.py.
READ_WINDOW = 64 << 20


def nf4_bytes(n: int, block_size: int = 64, double_quant: bool = True) -> int:
    """Returns the bytes of n weights in NF4.

    4 bits per weight; a float32 absmax per block or, with double quantization, 8 bits per block,
    a float32 absmax2 per group of 256 blocks and one float32 offset.

    Example:
        >>> nf4_bytes(4096 * 4096) * 8 / 4096**2
        4.126955032348633
    """
    codes = (n + 1) // 2
    blocks = -(-n // block_size)
    if not double_quant:
        return codes + 4 * blocks

    groups = -(-blocks // GROUP)
    return codes + blocks + 4 * groups + 4


def total(kinds: Mapping[str, int]) -> int:
    """The bytes of all kinds of memory together."""
    return sum(kinds.values())


def present(kinds: Mapping[str, int]) -> dict[str, int]:
    """The kinds of memory that are not zero."""
    return {kind: n for kind, n in kinds.items() if n}


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder, from which its activations follow.

    Attributes:
        hidden: H, the size of the residual stream.
        layers: L, the number of blocks.
        heads: number of heads of the queries.
        attention: A, the size of all queries of a token.
        keys: K, the size of all keys of a token.
        width: I, the size between the layers of the MLP.
        vocabulary: V.
        gated: whether the MLP multiplies two projections, act(gate) up; otherwise act(up).
        norms: values per token that are normalized in a block: 2 H, and A + K more for a norm of
            queries and keys.
        vectors: number of vectors that they are normalized in: 2, and one per head more.
        rms: whether the norms are RMSNorms, which compute in float32; otherwise nn.LayerNorm.
    """

    hidden: int
    layers: int
    heads: int
    attention: int
    keys: int
    width: int
    vocabulary: int
    gated: bool
    norms: int
    vectors: int
    rms: bool


@dataclass(frozen=True)
class Adapters:
    """The adapters of a decoder, and what those of one block keep per token.

    Attributes:
        parameters: of all blocks together.
        ranks: sum of the ranks of a block's adapted layers.
        inputs: sum of the sizes of the inputs that they keep. An input that several layers share,
            such as that of queries, keys and values, counts once.
        output: the part of `inputs` that is the attention's output.
        product: the part of `inputs` that the last layer of the MLP keeps.
        dropped: sum of the sizes of all their inputs, each of which has its own dropout mask.
    """

    parameters: int
    ranks: int
    inputs: int
    output: int
    product: int
    dropped: int


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass.

    Attributes:
        size: number of sequences.
        length: tokens per sequence.
        checkpointing: gradient checkpointing: only the inputs of the blocks are kept.
        dropout: whether the adapters have dropout.
        compute_bytes: c, bytes of a number in the dtype of the activations.
        efficient: the training step of `finetune`, with norms and MLPs that keep less and a loss in
            chunks. Otherwise the modules and the loss of transformers.
        quantized: whether the base is in NF4.
    """

    size: int
    length: int
    checkpointing: bool
    dropout: bool
    compute_bytes: int
    efficient: bool
    quantized: bool = False

    @property
    def tokens(self) -> int:
        """M, the number of tokens."""
        return self.size * self.length

    @property
    def keeps_masks(self) -> bool:
        """Whether dropout's masks are kept: NF4 layers draw them again in the backward pass."""
        return self.dropout and not self.quantized


def kept_per_block(d: Decoder, a: Adapters, batch: Batch) -> dict[str, int]:
    """Returns the bytes that one block keeps per token for the backward pass, by what keeps them.

    Example:
        >>> llama = Decoder(4096, 32, 32, 4096, 4096, 11008, 32000, True, 8192, 2, True)
        >>> adapters = Adapters(39_976_960, 112, 23296, output=4096, product=11008, dropped=35584)
        >>> kept_per_block(llama, adapters, Batch(1, 512, False, False, 2, efficient=True))["MLP"]
        44032
    """
    c = batch.compute_bytes
    # gate and up, and of transformers' modules act(gate); or what the activation is applied to.
    factors = (2 if batch.efficient else 3) if d.gated else 1

    # Queries, keys, values and output, which is the input of the next layer as well, and a float32
    # of the softmax for each head.
    attention = c * (2 * d.attention + 2 * d.keys) + FLOAT * d.heads
    inputs = a.inputs - a.output

    if batch.keeps_masks:
        # Each layer's drop(x), and its mask.
        inputs = 2 * a.dropped

    return {
        "norms": _kept_by_norms(d.norms, d.vectors, d, batch),
        "attention": attention,
        "MLP": c * factors * d.width,
        # x of the adapted layers, and z = x A^T.
        "adapters": c * (inputs + a.ranks),
    }


def _kept_by_norms(values: int, vectors: int, d: Decoder, batch: Batch) -> int:
    """Bytes: x in float32; in its own dtype, with one float32 per vector, for efficient norms."""
    if d.rms and not batch.efficient:
        return FLOAT * values
    return batch.compute_bytes * values + FLOAT * vectors


def logits_bytes(d: Decoder, batch: Batch) -> int:
    """Returns what the loss needs at most. Every token counts, as if all of them were learned.

    In chunks (see minilora/losses): the logits of a chunk, 4 MB of float32, which on a GPU are a
    chunk's as well, and the last hidden states with their gradient. The loss of transformers: three
    float32 buffers of the size of all logits, which are log-softmax, its gradient and theirs.
    """
    M, V = batch.tokens, d.vocabulary
    if not batch.efficient:
        return 3 * FLOAT * M * V
    c = batch.compute_bytes
    chunk = max(64, min(512, 2**24 // V))
    logits = min(M, chunk) * V
    hidden = 2 * M * d.hidden
    return c * (logits + hidden) + FLOAT * min(2**20, logits)


@dataclass(frozen=True)
class Activations:
    """Bytes of the activations at three moments of a step.

    Attributes:
        forward: when the forward pass reaches the loss.
        backward: at most, in the backward pass before the first adapter has its gradients.
        last_block: in the backward pass of the block that comes last, the model's first.
    """

    forward: int
    backward: int
    last_block: int


def activation_bytes(d: Decoder, a: Adapters, batch: Batch) -> Activations:
    """Returns the bytes of the activations, with gradient checkpointing or without.

    Without it, every block keeps `kept_per_block` from the forward pass on. With it, every block
    keeps its input [M, H], and one block at a time computes the rest again. The largest temporary
    tensors of a backward pass are in the model's last norm, and in the MLP of each block.
    """
    c, M = batch.compute_bytes, batch.tokens
    block_input = M * c * d.hidden
    # If the compute dtype is not that of the adapters, a copy of them is kept as well.
    copies = c * a.parameters // d.layers if c < FLOAT else 0
    block = M * total(kept_per_block(d, a, batch)) + copies

    # Gradients of the product and of both factors, and of the block's output; in an efficient step
    # also act(gate). What the last layer kept has been freed by then.
    widths = 4 if batch.efficient and d.gated else 3
    gone = 2 * a.product if batch.keeps_masks else a.product
    in_mlp = M * c * (widths * d.width + d.hidden - gone)
    # What a norm keeps of x; n or x^2 and gradients, in float32. A LayerNorm's kernel needs dx.
    norm = M * _kept_by_norms(d.hidden, 1, d, batch)
    temporary = (3 if batch.efficient else 5) * FLOAT
    in_norm = M * d.hidden * (temporary if d.rms else c)

    if batch.checkpointing:
        inputs = d.layers * block_input
        backward = inputs + max(norm + in_norm, block + in_mlp)
        return Activations(inputs + norm, backward, block_input + block - norm + in_mlp)

    # The embedding is frozen: the first norm keeps nothing.
    blocks = d.layers * block - norm
    backward = blocks + max(norm + in_norm, in_mlp)
    return Activations(blocks + norm, backward, block - norm + in_mlp)


@dataclass(frozen=True)
class Run:
    """What a run holds, and a batch of it: enough to say what each phase needs.

    Attributes:
        held: bytes of what is there as long as the run lasts, by kind.
        gradients: bytes of the gradients of everything that is trained.
        loading: bytes of what is there while the model is loaded, by kind.
        decoder, adapters, batch: what the activations follow from.
        accumulate: whether gradients of earlier batches are there in every phase.
        gathered: bytes of what several GPUs share and each has whole while it computes.
    """

    held: Mapping[str, int]
    gradients: int
    loading: Mapping[str, int]
    decoder: Decoder
    adapters: Adapters
    batch: Batch
    accumulate: bool = False
    gathered: int = 0

    def phases(self) -> dict[str, dict[str, int]]:
        """Returns phase -> kind -> bytes alive when the phase needs the most."""
        activations = activation_bytes(self.decoder, self.adapters, self.batch)
        logits = logits_bytes(self.decoder, self.batch)

        # The blocks get their gradients one after the other.
        earlier = self.gradients if self.accumulate else 0
        later = max(earlier, self.gradients - self.gradients // self.decoder.layers)
        first_block = {"gradients": earlier, "activations": activations.backward}
        last_block = {"gradients": later, "activations": activations.last_block}

        found: dict[str, dict[str, int]] = {
            "loading": dict(self.loading),
            "loss": {"gradients": earlier, "activations": activations.forward, "logits": logits},
            "backward": max(first_block, last_block, key=total),
            "step": {"gradients": self.gradients},
        }
        for name, kinds in found.items():
            held = {} if name == "loading" else self.held
            gathered = self.gathered if name in ("loss", "backward") else 0
            found[name] = present({**held, "gathered": gathered, **kinds})
        return found

    def peak(self) -> tuple[str, int]:
        """Returns the phase that needs the most, and its bytes."""
        phases = self.phases()
        name = max(phases, key=lambda phase: total(phases[phase]))
        return name, total(phases[name])


def full_finetuning(run: Run, parameters: int) -> Run:
    """Returns the run that trains every weight in the compute dtype, for comparison.

    Weights, gradients and each of AdamW's two states have the same size. Every linear layer keeps
    its input, as with adapters on all of them, and every norm what its weight is multiplied by. The
    modules and the loss are those of transformers.
    """
    d = run.decoder
    weights = run.batch.compute_bytes * parameters
    # A paged optimizer has its states in host memory.
    states = 2 * weights if run.held["optimizer"] else 0
    return replace(
        run,
        held={"dense": weights, "optimizer": states},
        gradients=weights,
        loading={"dense": weights},
        adapters=Adapters(
            parameters=0,
            ranks=0,
            inputs=2 * d.hidden + d.attention + d.width + d.norms,
            output=d.attention,
            product=d.width,
            dropped=0,
        ),
        batch=replace(run.batch, dropout=False, efficient=False, quantized=False),
    )


def dense_lora(run: Run, parameters: int) -> Run:
    """Returns the run with the same adapters on a base that is not quantized, for comparison."""
    base = {"dense": run.batch.compute_bytes * parameters}
    rest = {kind: run.held[kind] for kind in ("adapters", "optimizer")}
    batch = replace(run.batch, quantized=False)
    return replace(run, held={**base, **rest}, loading=base, batch=batch)
