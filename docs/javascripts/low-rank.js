// An update and its best approximations of rank r, from its singular values: for "How much rank does
// an update need?". tests/project/test_explorables.py compares the results with PyTorch's.

// A matrix that docs/measure_update.py stored in 16-bit integers and a step.
function decodeMatrix({ rows, columns, step, int16 }) {
  const bytes = Uint8Array.from(atob(int16), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = Float64Array.from(
    { length: rows * columns },
    (_, i) => step * view.getInt16(2 * i, true),
  );
  return { rows, columns, values };
}

const energyOf = (sigma) => sigma.reduce((sum, s) => sum + s * s, 0);

// |dW - dW_r| / |dW|: what the singular values after the first r hold.
function relativeError(sigma, r) {
  return Math.sqrt(energyOf(sigma.slice(r)) / energyOf(sigma));
}

/**
 * The sum of the first r terms s_k u_k v_k^T, row by row.
 *
 * @param U [rows, k], V [columns, k]: some rows of the factors
 */
function approximation(U, sigma, V, r) {
  const values = new Float64Array(U.rows * V.rows);
  for (let i = 0; i < U.rows; i++) {
    for (let j = 0; j < V.rows; j++) {
      let sum = 0;
      for (let k = 0; k < r; k++) {
        sum += sigma[k] * U.values[i * U.columns + k] * V.values[j * V.columns + k];
      }
      values[i * V.rows + j] = sum;
    }
  }
  return values;
}

// Of A [r, in] and B [out, r].
function adapterParameters([out, into], r) {
  return r * (out + into);
}

// How much of what full fine-tuning gains is gained with this loss.
function shareOfImprovement(losses, loss) {
  const [before, after] = [losses[0], losses[losses.length - 1]];
  return (before - loss) / (before - after);
}
