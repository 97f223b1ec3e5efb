// The memory of a run: the formulas of minilora/reports/memory.py, for the calculator.
//
// The functions have the names and the order of those in memory.py, where they are explained, so that
// the two files can be read side by side. tests/reports/test_calculator.py compares their results.

const FLOAT = 4;
const READ_WINDOW = 64 * 2 ** 20;

function nf4Bytes(n) {
  const codes = Math.ceil(n / 2);
  const blocks = Math.ceil(n / 64);
  const groups = Math.ceil(blocks / 256);
  return codes + blocks + 4 * groups + 4;
}

const sum = (numbers) => numbers.reduce((all, n) => all + n, 0);

const total = (kinds) => sum(Object.values(kinds));

const present = (kinds) => Object.fromEntries(Object.entries(kinds).filter(([, n]) => n));

const tokens = (batch) => batch.size * batch.length;

const keepsMasks = (batch) => batch.dropout && !batch.quantized;

function keptPerBlock(d, a, batch) {
  const c = batch.computeBytes;
  const factors = batch.efficient ? 2 : 3;

  const attention = c * (2 * d.attention + 2 * d.keys) + FLOAT * d.heads;
  let inputs = a.inputs - a.output;

  if (keepsMasks(batch)) inputs = 2 * a.dropped;

  return {
    norms: keptByNorms(d.norms, d.vectors, batch),
    attention,
    MLP: c * factors * d.width,
    adapters: c * (inputs + a.ranks),
  };
}

function keptByNorms(values, vectors, batch) {
  if (!batch.efficient) return FLOAT * values;
  return batch.computeBytes * values + FLOAT * vectors;
}

function logitsBytes(d, batch) {
  const M = tokens(batch);
  const V = d.vocabulary;
  if (!batch.efficient) return 3 * FLOAT * M * V;
  const c = batch.computeBytes;
  const chunk = Math.max(64, Math.min(512, Math.floor(2 ** 24 / V)));
  const logits = Math.min(M, chunk) * V;
  const hidden = 2 * M * d.hidden;
  return c * (logits + hidden) + FLOAT * Math.min(2 ** 20, logits);
}

function activationBytes(d, a, batch) {
  const c = batch.computeBytes;
  const M = tokens(batch);
  const blockInput = M * c * d.hidden;
  const copies = c < FLOAT ? Math.floor((c * a.parameters) / d.layers) : 0;
  const block = M * total(keptPerBlock(d, a, batch)) + copies;

  const widths = batch.efficient ? 4 : 3;
  const gone = keepsMasks(batch) ? 2 * a.product : a.product;
  const inMLP = M * c * (widths * d.width + d.hidden - gone);
  const norm = M * keptByNorms(d.hidden, 1, batch);
  const temporary = (batch.efficient ? 3 : 5) * FLOAT;
  const inNorm = M * d.hidden * temporary;

  if (batch.checkpointing) {
    const inputs = d.layers * blockInput;
    const backward = inputs + Math.max(norm + inNorm, block + inMLP);
    return { forward: inputs + norm, backward, lastBlock: blockInput + block - norm + inMLP };
  }

  const blocks = d.layers * block - norm;
  const backward = blocks + Math.max(norm + inNorm, inMLP);
  return { forward: blocks + norm, backward, lastBlock: block - norm + inMLP };
}

function phases(run) {
  const activations = activationBytes(run.decoder, run.adapters, run.batch);
  const logits = logitsBytes(run.decoder, run.batch);

  const earlier = run.accumulate ? run.gradients : 0;
  const later = Math.max(earlier, run.gradients - Math.floor(run.gradients / run.decoder.layers));
  const firstBlock = { gradients: earlier, activations: activations.backward };
  const lastBlock = { gradients: later, activations: activations.lastBlock };

  return {
    loading: present(run.loading),
    loss: present({ ...run.held, gradients: earlier, activations: activations.forward, logits }),
    backward: present({ ...run.held, ...(total(firstBlock) >= total(lastBlock) ? firstBlock : lastBlock) }),
    step: present({ ...run.held, gradients: run.gradients }),
  };
}

function fullFinetuning(run, parameters) {
  const d = run.decoder;
  const weights = run.batch.computeBytes * parameters;
  const states = run.held.optimizer ? 2 * weights : 0;
  return {
    ...run,
    held: { dense: weights, optimizer: states },
    gradients: weights,
    loading: { dense: weights },
    adapters: {
      parameters: 0,
      ranks: 0,
      inputs: 2 * d.hidden + d.attention + d.width + d.norms,
      output: d.attention,
      product: d.width,
      dropped: 0,
    },
    batch: { ...run.batch, dropout: false, efficient: false, quantized: false },
  };
}

function denseLora(run, parameters) {
  const base = { dense: run.batch.computeBytes * parameters };
  const { adapters, optimizer } = run.held;
  const batch = { ...run.batch, quantized: false };
  return { ...run, held: { ...base, adapters, optimizer }, loading: base, batch };
}

// From here on: what minilora.plan finds in a model, of the shapes in minilora/reports/shapes.py.

// [model_type, hidden, width, layers, heads, heads of the keys, vocabulary, tied embeddings, size of a head]
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
  "llama-3.1-405b": ["llama", 16384, 53248, 126, 128, 8, 128256, false],
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

// The sizes of a named model; linear has the [out, in] of the linear layers in each block.
function decoder(name) {
  const [kind, hidden, width, layers, heads, keyHeads, vocabulary, tied, head = hidden / heads] = SHAPES[name];
  const [attention, keys] = [heads * head, keyHeads * head];
  const toQueriesKeysValues = [[attention, hidden], [keys, hidden], [keys, hidden]];
  const mlp = [[width, hidden], [width, hidden], [hidden, width]];
  const linear = [...toQueriesKeysValues, [hidden, attention], ...mlp];

  // Norms of queries and keys, head by head.
  const byHead = kind === "qwen3";
  const norms = 2 * hidden + (byHead ? attention + keys : 0);
  const vectors = 2 + (byHead ? heads + keyHeads : 0);

  const biases = kind === "qwen2" ? attention + 2 * keys : 0;
  const perBlock = 2 * hidden + biases + (byHead ? 2 * head : 0);
  const notLinear = layers * perBlock + hidden + (tied ? 1 : 2) * vocabulary * hidden;
  const parameters = layers * sum(linear.map(([out, into]) => out * into)) + notLinear;
  return { hidden, layers, heads, attention, keys, width, vocabulary, norms, vectors, linear, notLinear, parameters };
}

// A QLoRA run with adapters of rank r on all linear layers.
function qlora(settings) {
  const d = decoder(settings.model);
  const { r, c } = settings;
  const sizes = d.linear.map(([out, into]) => out * into);
  const parameters = d.layers * sum(d.linear.map(([out, into]) => r * (out + into)));

  const base = { quantized: d.layers * sum(sizes.map(nf4Bytes)), dense: c * d.notLinear };
  const largest = c * Math.max(...sizes);
  const reading = Math.min(c * d.layers * sum(sizes), Math.max(READ_WINDOW, largest));
  const gradients = FLOAT * parameters;
  const optimizer = settings.pagedOptimizer ? 0 : 2 * gradients;
  return {
    held: { ...base, adapters: FLOAT * parameters, optimizer },
    gradients,
    loading: { ...base, reading },
    decoder: d,
    adapters: {
      parameters,
      ranks: d.linear.length * r,
      inputs: 2 * d.hidden + d.attention + d.width,
      output: d.attention,
      product: d.width,
      dropped: sum(d.linear.map(([, into]) => into)),
    },
    batch: {
      size: settings.batchSize,
      length: settings.length,
      checkpointing: settings.checkpointing,
      dropout: settings.dropout,
      computeBytes: c,
      efficient: settings.efficient,
      quantized: true,
    },
    accumulate: settings.accumulate,
  };
}

const METHODS = {
  qlora: (run) => run,
  lora: denseLora,
  full: fullFinetuning,
};

/**
 * The memory of a run, in bytes.
 *
 * @param settings {model, method: a key of METHODS, r, batchSize, length, checkpointing, dropout,
 *   accumulate, pagedOptimizer, efficient, c: bytes of a number in the compute dtype}
 * @returns {parameters, trainable, phases: phase -> kind -> bytes, phase: the one that needs the
 *   most, peak: its bytes}
 */
function memory(settings) {
  const adapted = qlora(settings);
  const { parameters } = adapted.decoder;
  const trainable = settings.method === "full" ? parameters : adapted.adapters.parameters;

  const found = phases(METHODS[settings.method](adapted, parameters));
  const names = Object.keys(found);
  const phase = names.reduce((most, name) => (total(found[name]) > total(found[most]) ? name : most));
  return { parameters, trainable, phases: found, phase, peak: total(found[phase]) };
}

// As in minilora/reports/largest_batch.py: of a GPU's memory, what a run cannot use, and a batch that is
// large enough for everyone.
const RESERVED = 1e9;
const LARGEST_BATCH = 1024;

// The largest batch size that fits so many bytes; 0: not even one sequence.
function largestBatch(settings, bytes) {
  let [low, high] = [0, LARGEST_BATCH + 1];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (memory({ ...settings, batchSize: middle }).peak <= bytes - RESERVED) low = middle;
    else high = middle;
  }
  return low;
}

// Node reads this file as a module, a page as a script.
if (typeof module !== "undefined") module.exports = { SHAPES, memory, largestBatch };
