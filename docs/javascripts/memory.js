// The memory of a run: the formulas of minilora/reports/memory.py, for the calculator.
// tests/reports/test_calculator.py compares them with minilora.plan, and SHAPES with shapes.py.
//
// Sizes per token: H hidden, A all heads of the queries, K all heads of the keys, I the MLP's width,
// V vocabulary; L blocks, r rank, c bytes of a number in the compute dtype, M tokens of a batch.

const FLOAT = 4;
const READ_WINDOW = 64 * 2 ** 20;
const RESERVED = 1e9;

// [model_type, H, I, L, heads, heads of the keys, V, tied embeddings, size of a head]
const SHAPES = {
  "llama-7b": ["llama", 4096, 11008, 32, 32, 32, 32000, false],
  "llama-13b": ["llama", 5120, 13824, 40, 40, 40, 32000, false],
  "llama-33b": ["llama", 6656, 17920, 60, 52, 52, 32000, false],
  "llama-65b": ["llama", 8192, 22016, 80, 64, 64, 32000, false],
  "llama-2-7b": ["llama", 4096, 11008, 32, 32, 32, 32000, false],
  "llama-2-13b": ["llama", 5120, 13824, 40, 40, 40, 32000, false],
  "llama-2-70b": ["llama", 8192, 28672, 80, 64, 8, 32000, false],
  "llama-3-8b": ["llama", 4096, 14336, 32, 32, 8, 128256, false],
  "llama-3-70b": ["llama", 8192, 28672, 80, 64, 8, 128256, false],
  "llama-3.2-1b": ["llama", 2048, 8192, 16, 32, 8, 128256, true, 64],
  "llama-3.2-3b": ["llama", 3072, 8192, 28, 24, 8, 128256, true, 128],
  "smollm2-135m": ["llama", 576, 1536, 30, 9, 3, 49152, true],
  "smollm2-360m": ["llama", 960, 2560, 32, 15, 5, 49152, true],
  "smollm2-1.7b": ["llama", 2048, 8192, 24, 32, 32, 49152, true],
  "tinyllama": ["llama", 2048, 5632, 22, 32, 4, 32000, false],
  "mistral-7b": ["mistral", 4096, 14336, 32, 32, 8, 32000, false, 128],
  "qwen2.5-0.5b": ["qwen2", 896, 4864, 24, 14, 2, 151936, true],
  "qwen2.5-1.5b": ["qwen2", 1536, 8960, 28, 12, 2, 151936, true],
  "qwen2.5-3b": ["qwen2", 2048, 11008, 36, 16, 2, 151936, true],
  "qwen2.5-7b": ["qwen2", 3584, 18944, 28, 28, 4, 152064, false],
  "qwen2.5-14b": ["qwen2", 5120, 13824, 48, 40, 8, 152064, false],
  "qwen2.5-32b": ["qwen2", 5120, 27648, 64, 40, 8, 152064, false],
  "qwen2.5-72b": ["qwen2", 8192, 29568, 80, 64, 8, 152064, false],
  "qwen3-0.6b": ["qwen3", 1024, 3072, 28, 16, 8, 151936, true, 128],
  "qwen3-1.7b": ["qwen3", 2048, 6144, 28, 16, 8, 151936, true, 128],
  "qwen3-4b": ["qwen3", 2560, 9728, 36, 32, 8, 151936, true, 128],
  "qwen3-8b": ["qwen3", 4096, 12288, 36, 32, 8, 151936, false, 128],
  "qwen3-14b": ["qwen3", 5120, 17408, 40, 40, 8, 151936, false, 128],
  "qwen3-32b": ["qwen3", 5120, 25600, 64, 64, 8, 151936, false, 128],
};

// The bytes of n weights in NF4: 4 bits per weight, 8 per block of 64, 32 per group of 256 blocks.
function nf4Bytes(n) {
  const blocks = Math.ceil(n / 64);
  return Math.ceil(n / 2) + blocks + 4 * Math.ceil(blocks / 256) + 4;
}

function decoder(name) {
  const [kind, H, I, L, heads, keyHeads, V, tied, head = H / heads] = SHAPES[name];
  const [A, K] = [heads * head, keyHeads * head];
  const linear = [[A, H], [K, H], [K, H], [H, A], [I, H], [I, H], [H, I]]; // [out, in], in each block

  // Biases of queries, keys and values; norms of queries and keys.
  const biases = kind === "qwen2" ? A + 2 * K : 0;
  const headNorms = kind === "qwen3" ? 2 * head : 0;
  const weights = sum(linear.map(([out, into]) => out * into));
  const others = L * (2 * H + biases + headNorms) + H + (tied ? 1 : 2) * V * H;
  const norms = 2 * H + (kind === "qwen3" ? A + K : 0);
  const vectors = 2 + (kind === "qwen3" ? heads + keyHeads : 0);
  return { H, I, L, heads, A, K, V, linear, norms, vectors, others, parameters: L * weights + others };
}

const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);

function keptPerBlock(d, adapters, run) {
  const { c, efficient, dropout } = run;
  const inputs = adapters.inputs - adapters.output;
  return {
    norms: keptByNorms(d.norms, d.vectors, run),
    attention: c * (2 * d.A + 2 * d.K) + FLOAT * d.heads,
    MLP: (efficient ? 2 : 3) * c * d.I,
    adapters: c * (dropout ? 2 * adapters.dropped : inputs) + c * adapters.ranks,
  };
}

function keptByNorms(values, vectors, { c, efficient }) {
  return efficient ? c * values + FLOAT * vectors : FLOAT * values;
}

function logitsBytes(d, { c, efficient, batchSize, length }) {
  const M = batchSize * length;
  if (!efficient) return 3 * FLOAT * M * d.V;
  const chunk = Math.min(M, Math.max(64, Math.min(512, Math.floor(2 ** 24 / d.V))));
  return c * chunk * d.V + FLOAT * Math.min(2 ** 20, chunk * d.V) + 2 * c * M * d.H;
}

function activationBytes(d, adapters, run) {
  const { c } = run;
  const M = run.batchSize * run.length;
  const blockInput = M * c * d.H;
  const copies = c < FLOAT ? Math.floor((c * adapters.parameters) / d.L) : 0;
  const block = M * sum(Object.values(keptPerBlock(d, adapters, run))) + copies;

  const inMLP = M * c * ((run.efficient ? 4 : 3) * d.I + d.H - (run.dropout ? 2 : 1) * adapters.product);
  const norm = M * keptByNorms(d.H, 1, run);
  const inNorm = M * d.H * (run.efficient ? 3 : 5) * FLOAT;

  if (run.checkpointing) {
    const inputs = d.L * blockInput;
    const backward = inputs + Math.max(norm + inNorm, block + inMLP);
    return { forward: inputs + norm, backward, lastBlock: blockInput + block - norm + inMLP };
  }
  const blocks = d.L * block - norm;
  const backward = blocks + Math.max(norm + inNorm, inMLP);
  return { forward: blocks + norm, backward, lastBlock: block - norm + inMLP };
}

// What each method holds: the weights, what is trained, and what the adapters keep of a token.
function held(d, run) {
  const { c, r } = run;
  if (run.method === "full") {
    const weights = c * d.parameters;
    const inputs = 2 * d.H + d.A + d.I + d.norms;
    return {
      base: { dense: weights },
      trained: {},
      gradients: weights,
      reading: 0,
      trainable: d.parameters,
      adapters: { parameters: 0, ranks: 0, inputs, output: d.A, product: d.I, dropped: 0 },
    };
  }
  const sizes = d.linear.map(([out, into]) => out * into);
  const parameters = d.L * sum(d.linear.map(([out, into]) => r * (out + into)));
  const quantized = run.method === "qlora";
  const largest = c * Math.max(...sizes);
  return {
    base: quantized
      ? { quantized: d.L * sum(sizes.map(nf4Bytes)), dense: c * d.others }
      : { dense: c * d.parameters },
    trained: { adapters: FLOAT * parameters },
    gradients: FLOAT * parameters,
    reading: quantized ? Math.min(c * d.L * sum(sizes), Math.max(READ_WINDOW, largest)) : 0,
    trainable: parameters,
    adapters: {
      parameters,
      ranks: 7 * r,
      inputs: 2 * d.H + d.A + d.I,
      output: d.A,
      product: d.I,
      dropped: sum(d.linear.map(([, into]) => into)),
    },
  };
}

/**
 * The memory of a run, in bytes.
 *
 * @param settings {model, method: "qlora" | "lora" | "full", r, batchSize, length, checkpointing,
 *   dropout, accumulate, pagedOptimizer, efficient, c}
 * @returns {parameters, trainable, phases: phase -> kind -> bytes, phase: the one that needs the
 *   most, peak: its bytes}
 */
function memory(settings) {
  // Layers in NF4 keep no dropout masks; full fine-tuning has transformers' modules and loss.
  const dropout = settings.dropout && settings.method === "lora";
  const run = { ...settings, dropout, efficient: settings.efficient && settings.method !== "full" };
  const d = decoder(run.model);
  const { base, trained, gradients, reading, trainable, adapters } = held(d, run);
  const activations = activationBytes(d, adapters, run);
  const logits = logitsBytes(d, run);

  const optimizer = run.pagedOptimizer ? 0 : 2 * gradients;
  const always = { ...base, ...trained, optimizer };
  const earlier = run.accumulate ? gradients : 0;
  const later = Math.max(earlier, gradients - Math.floor(gradients / d.L));
  const firstBlock = { gradients: earlier, activations: activations.backward };
  const lastBlock = { gradients: later, activations: activations.lastBlock };
  const total = (kinds) => sum(Object.values(kinds));

  const phases = {
    loading: { ...base, reading },
    loss: { ...always, gradients: earlier, activations: activations.forward, logits },
    backward: { ...always, ...(total(firstBlock) >= total(lastBlock) ? firstBlock : lastBlock) },
    step: { ...always, gradients },
  };
  for (const kinds of Object.values(phases)) {
    for (const kind of Object.keys(kinds)) if (!kinds[kind]) delete kinds[kind];
  }
  const names = Object.keys(phases);
  const phase = names.reduce((most, name) => (total(phases[name]) > total(phases[most]) ? name : most));
  return { parameters: d.parameters, trainable, phases, phase, peak: total(phases[phase]) };
}

// The largest batch size that fits so many bytes, up to 1024; 0: not even one sequence.
function largestBatch(run, bytes) {
  let [low, high] = [0, 1025];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (memory({ ...run, batchSize: middle }).peak <= bytes - RESERVED) low = middle;
    else high = middle;
  }
  return low;
}

// Node reads this file as a module, a page as a script.
if (typeof module !== "undefined") module.exports = { SHAPES, memory, largestBatch };
