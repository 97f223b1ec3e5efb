// Blockwise quantization to 16 levels: the formulas of kernels/reference/nf4.py, for "Sixteen levels".
//
// Every step is rounded to float32 as there, so that codes and errors are those of the library.
// tests/project/test_explorables.py compares them.

const float32 = Math.fround;

// The published digits, as in kernels/reference/codebooks.py.
const NF4 = Float32Array.of(
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
);

// -7 ... 7 in sevenths: zero is a level and both sides are alike, so one of the 16 codes is unused.
const INT4 = Float32Array.from({ length: 15 }, (_, i) => (i - 7) / 7);

const BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096];

// Blocks that share an absmax2, and the smallest magnitude whose reciprocal is finite.
const GROUP = 256;
const TINY = float32(1e-38);

function midpoints(levels) {
  return levels.slice(1).map((level, i) => float32(levels[i] + level) / 2);
}

// The number of thresholds below y, by bisection.
function codeOf(y, thresholds) {
  let [low, high] = [0, thresholds.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (thresholds[middle] < y) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The largest magnitude of each block.
function absmaxOf(x, blockSize) {
  const absmax = new Float32Array(Math.ceil(x.length / blockSize));
  x.forEach((value, i) => {
    const b = Math.floor(i / blockSize);
    absmax[b] = Math.max(absmax[b], Math.abs(value));
  });
  return absmax;
}

// The signed 8-bit map of double quantization: `derive_map8` of codebooks.py.
function deriveMap8() {
  const values = [0, 1];
  const tenth = float32(0.1);
  for (let i = 0; i < 7; i++) {
    const parts = 2 ** i;
    const step = float32(float32(1 - tenth) / parts);
    const edge = (k) => float32(k < (parts + 1) >> 1 ? tenth + step * k : 1 - step * (parts - k));
    const edges = Float32Array.from({ length: parts + 1 }, (_, k) => edge(k));
    for (const middle of midpoints(edges)) {
      const value = float32(middle * float32(10 ** (i - 6)));
      values.push(value, -value);
    }
  }
  return Float32Array.from(values).sort();
}

const MAP8 = deriveMap8();
const MAP8_THRESHOLDS = midpoints(MAP8);

// absmax after it was stored in 8 bits: map8[c] * absmax2 + offset.
function doubleQuantized(absmax) {
  const offset = float32(absmax.reduce((sum, value) => sum + value, 0) / absmax.length);
  const centered = absmax.map((value) => value - offset);
  const absmax2 = absmaxOf(centered, GROUP);
  return centered.map((value, b) => {
    const scale = absmax2[Math.floor(b / GROUP)];
    const y = float32(value * float32(1 / Math.max(scale, TINY)));
    const code = scale ? codeOf(y, MAP8_THRESHOLDS) : 0;
    return float32(float32(MAP8[code] * scale) + offset);
  });
}

/**
 * Quantizes and dequantizes.
 *
 * @param x Float32Array
 * @param levels ascending, in [-1, 1]
 * @returns {restored: Float32Array, used: the number of weights of each level, absmax: of each block,
 *   as stored, error: |restored - x| / |x|}
 */
function quantize(x, levels, blockSize, double) {
  const thresholds = midpoints(levels);
  const exact = absmaxOf(x, blockSize);
  const absmax = double ? doubleQuantized(exact) : exact;
  const reciprocal = exact.map((value) => 1 / Math.max(value, TINY));

  const used = new Array(levels.length).fill(0);
  const restored = new Float32Array(x.length);
  let [errors, squares] = [0, 0];
  for (let i = 0; i < x.length; i++) {
    const b = Math.floor(i / blockSize);
    const code = codeOf(float32(x[i] * reciprocal[b]), thresholds);
    used[code] += 1;
    restored[i] = levels[code] * absmax[b];
    errors += (restored[i] - x[i]) ** 2;
    squares += x[i] ** 2;
  }
  return { restored, used, absmax, error: squares ? Math.sqrt(errors / squares) : 0 };
}

function bitsPerWeight(blockSize, double) {
  return 4 + (double ? (8 + 32 / GROUP) / blockSize : 32 / blockSize);
}

// From here on: the weights that a histogram stands for.

const BARS = 41;
const EDGE = 4; // the histogram shows -4 ... 4
const COUNT = 65536;
const OUTLIER_EVERY = 1024;

const WIDTH = (2 * EDGE) / BARS;
const centers = Array.from({ length: BARS }, (_, i) => (i + 0.5) * WIDTH - EDGE);

// Of SmolLM2-135M, q_proj of layer 20, in standard deviations: weights in each bar, in thousandths
// of the tallest. A test counts them again.
const LAYER = [
  4, 6, 7, 11, 14, 18, 26, 33, 46, 58, 77, 101, 131, 173, 227, 285, 377, 485, 662, 871, 1000,
  881, 660, 485, 373, 295, 221, 175, 131, 101, 80, 57, 44, 33, 24, 19, 13, 11, 8, 5, 4,
];

const SHAPES_OF_WEIGHTS = {
  normal: centers.map((x) => Math.exp((-x * x) / 2)),
  heavy: centers.map((x) => Math.exp(-Math.SQRT2 * Math.abs(x))),
  uniform: centers.map((x) => (Math.abs(x) < Math.sqrt(3) ? 0.8 : 0)),
  layer: LAYER.map((count) => count / 1000),
};

// Pseudorandom numbers in [0, 1), the same at every visit.
function* random(state) {
  while (true) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    yield state / 2 ** 32;
  }
}

const ORDER = (() => {
  const order = Uint32Array.from({ length: COUNT }, (_, i) => i);
  const numbers = random(29);
  for (let i = COUNT - 1; i > 0; i--) {
    const j = Math.floor(numbers.next().value * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
})();

/**
 * As many weights in each bar as its height says, evenly spread in it, in a random order.
 *
 * @param bars heights; at least one is not 0
 * @param outlier the value of one weight in OUTLIER_EVERY; 0: none
 */
function weightsOf(bars, outlier) {
  const total = bars.reduce((sum, bar) => sum + bar, 0);
  const weights = new Float32Array(COUNT);
  let [bar, below] = [0, 0];
  for (let i = 0; i < COUNT; i++) {
    const share = ((i + 0.5) / COUNT) * total;
    while (bar < BARS - 1 && below + bars[bar] < share) below += bars[bar++];
    weights[ORDER[i]] = (bar + (share - below) / bars[bar]) * WIDTH - EDGE;
  }
  if (outlier) {
    const numbers = random(31);
    for (let first = 0; first < COUNT; first += OUTLIER_EVERY) {
      weights[first + Math.floor(numbers.next().value * OUTLIER_EVERY)] = outlier;
    }
  }
  return weights;
}
