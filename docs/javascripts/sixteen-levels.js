// The page "Sixteen levels": a histogram that can be dragged, and the levels of NF4 and int4 on it.

(() => {
  const { svg, text, percent, atWidth, announcer } = Explorable;
  const form = document.getElementById("levels");
  const plot = document.getElementById("levels-plot");
  const chart = document.getElementById("levels-errors");
  const summary = document.getElementById("levels-summary");
  const announce = announcer(document.getElementById("levels-status"));

  const FORMATS = { NF4, int4: INT4 };
  const HISTOGRAM = 170; // px, as are the following
  const STRIP = 68;
  const LINES = 210;
  const LEFT = 8;
  const KEYS = { ArrowUp: 0.02, ArrowDown: -0.02, PageUp: 0.1, PageDown: -0.1, Home: -1, End: 1 };

  let bars = [...SHAPES_OF_WEIGHTS.normal];
  let focused = (BARS - 1) / 2;
  const clamp = (value) => Math.min(1, Math.max(0, value));
  const number = (value) => value.toFixed(1).replace("-", "\u2212");

  function settings() {
    const { block, outlier, double } = form.elements;
    return {
      blockSize: BLOCK_SIZES[block.value],
      outlier: Number(outlier.value),
      double: double.checked,
    };
  }

  function median(values) {
    return [...values].sort((a, b) => a - b)[values.length >> 1];
  }

  // Everything that the page shows, or null where no weight is left.
  function computed() {
    if (!bars.some(Boolean)) return null;
    const { blockSize, outlier, double } = settings();
    const weights = weightsOf(bars, outlier);
    const found = {};
    for (const [name, levels] of Object.entries(FORMATS)) {
      const errors = BLOCK_SIZES.map((size) => quantize(weights, levels, size, double).error);
      const { used, absmax } = quantize(weights, levels, blockSize, double);
      found[name] = { errors, used, levels, error: errors[BLOCK_SIZES.indexOf(blockSize)] };
      found.absmax = median(absmax);
    }
    return found;
  }

  // The histogram and the two strips of levels.

  const histogram = svg("g", { class: "histogram" });
  const strips = svg("g");
  const picture = svg(
    "svg",
    { role: "group", "aria-label": "The weights, bar by bar, and the levels of both formats" },
    histogram,
    strips,
  );
  const handles = centers.map((center, i) => {
    const [low, high] = [center - WIDTH / 2, center + WIDTH / 2].map(number);
    const handle = svg("rect", {
      role: "slider",
      "aria-orientation": "vertical",
      "aria-label": `Weights from ${low} to ${high}`,
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    });
    handle.addEventListener("keydown", (event) => pressed(event, i));
    handle.addEventListener("focus", () => (focused = i));
    return handle;
  });
  histogram.append(svg("rect", { class: "paper", y: 0, height: HISTOGRAM }), ...handles);
  plot.append(picture);

  const xOf = (value, width) => LEFT + ((value + EDGE) / (2 * EDGE)) * (width - 2 * LEFT);

  function drawBars(width) {
    const barWidth = (width - 2 * LEFT) / BARS;
    histogram.firstChild.setAttribute("x", LEFT);
    histogram.firstChild.setAttribute("width", width - 2 * LEFT);
    handles.forEach((handle, i) => {
      const height = Math.max(1, bars[i] * (HISTOGRAM - 4));
      const place = { x: LEFT + i * barWidth + 0.5, y: HISTOGRAM - height, width: barWidth - 1, height };
      for (const [name, value] of Object.entries(place)) handle.setAttribute(name, value.toFixed(2));
      handle.setAttribute("aria-valuenow", Math.round(100 * bars[i]));
      handle.setAttribute("tabindex", i === focused ? 0 : -1);
    });
  }

  function strip(name, found, top, width) {
    const { used, levels } = found[name];
    const kind = name.toLowerCase();
    const base = top + STRIP - 14;
    const tallest = Math.max(...used);
    const made = [svg("line", { class: "ink", x1: LEFT, x2: width - LEFT, y1: base, y2: base })];
    let beyond = 0;
    levels.forEach((level, q) => {
      const value = level * found.absmax;
      if (Math.abs(value) > EDGE) beyond += 1;
      else {
        const x = xOf(value, width).toFixed(2);
        const height = (used[q] / tallest) * (STRIP - 32);
        made.push(svg("line", { class: `level ${kind}`, x1: x, x2: x, y1: base + 5, y2: base - height }));
      }
    });
    made.push(text(LEFT, top + 12, "start", name, `name ${kind}`));
    if (beyond) made.push(text(width - LEFT, top + 12, "end", `${beyond} levels beyond the picture`, "soft"));
    return made;
  }

  function drawPlot(width, found) {
    const height = HISTOGRAM + 2 * STRIP + 20;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("height", height);
    drawBars(width);
    strips.replaceChildren();
    if (!found) return;
    Object.keys(FORMATS).forEach((name, i) => {
      strips.append(...strip(name, found, HISTOGRAM + 6 + i * STRIP, width));
    });
    for (let x = -EDGE; x <= EDGE; x += 2) {
      const anchor = x === -EDGE ? "start" : x === EDGE ? "end" : "middle";
      strips.append(text(xOf(x, width), height - 2, anchor, String(x).replace("-", "\u2212"), "soft"));
    }
    const { outlier } = settings();
    if (outlier > EDGE) strips.append(text(width - LEFT - 4, 16, "end", `outliers at ${outlier} \u2192`, "soft"));
    else if (outlier) {
      const x = xOf(outlier, width);
      strips.append(svg("line", { class: "outlier", x1: x, x2: x, y1: HISTOGRAM - 24, y2: HISTOGRAM }));
    }
  }

  // The error at every block size.

  function drawErrors(width, found) {
    chart.replaceChildren();
    if (!found) return;
    const [left, right, top, bottom] = [44, 44, 12, 40];
    const highest = Math.max(...Object.keys(FORMATS).flatMap((name) => found[name].errors));
    const scale = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6].find((limit) => highest <= limit);
    const x = (i) => left + (i / (BLOCK_SIZES.length - 1)) * (width - left - right);
    const y = (error) => LINES - bottom - (error / scale) * (LINES - top - bottom);
    const said = Object.keys(FORMATS).map(
      (name) => `${name} ${BLOCK_SIZES.map((size, i) => `${size}: ${percent(found[name].errors[i])}`).join(", ")}`,
    );
    const drawn = svg("svg", {
      role: "img",
      viewBox: `0 0 ${width} ${LINES}`,
      height: LINES,
      "aria-label": `Relative error by block size. ${said.join(". ")}`,
    });
    for (const share of [0, 0.5, 1]) {
      const at = y(share * scale);
      drawn.append(
        svg("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }),
        text(left - 6, at + 4, "end", percent(share * scale, scale < 0.1 ? 1 : 0), "soft"),
      );
    }
    const chosen = x(BLOCK_SIZES.indexOf(settings().blockSize));
    drawn.append(svg("line", { class: "chosen", x1: chosen, x2: chosen, y1: top, y2: LINES - bottom }));
    BLOCK_SIZES.forEach((size, i) => drawn.append(text(x(i), LINES - bottom + 16, "middle", String(size), "soft")));
    drawn.append(text((left + width - right) / 2, LINES - 6, "middle", "block size", "soft"));
    const last = BLOCK_SIZES.length - 1;
    const [nf4, int4] = Object.keys(FORMATS).map((name) => y(found[name].errors[last]));
    const apart = Math.max(0, 14 - Math.abs(nf4 - int4)) / 2;
    for (const name of Object.keys(FORMATS)) {
      const kind = name.toLowerCase();
      const { errors } = found[name];
      const points = errors.map((error, i) => `${x(i).toFixed(1)},${y(error).toFixed(1)}`);
      const below = (name === "NF4") === nf4 >= int4;
      const label = y(errors[last]) + 4 + (below ? apart : -apart);
      drawn.append(
        svg("polyline", { class: `curve ${kind}`, points: points.join(" ") }),
        ...errors.map((error, i) => svg("circle", { class: `dot ${kind}`, cx: x(i), cy: y(error), r: 3 })),
        text(width - right + 8, label, "start", name, `name ${kind}`),
      );
    }
    chart.append(drawn);
  }

  function described(found) {
    if (!found) return "There are no weights: raise a bar.";
    const { blockSize, double } = settings();
    const bits = (twice) => bitsPerWeight(blockSize, twice).toFixed(3);
    const [better, worse] = found.NF4.error <= found.int4.error ? ["NF4", "int4"] : ["int4", "NF4"];
    const more = found[worse].error / found[better].error - 1;
    return (
      `Relative error: NF4 ${percent(found.NF4.error, 2)}, int4 ${percent(found.int4.error, 2)}` +
      ` (${worse} ${percent(more, 0)} more). ${bits(double)} bits per weight` +
      ` (${bits(!double)} with${double ? "out" : ""} double quantization).`
    );
  }

  let width = 0;
  function draw() {
    const found = computed();
    const { blockSize, outlier } = settings();
    drawPlot(width, found);
    drawErrors(width, found);
    form.elements.block.setAttribute("aria-valuetext", `${blockSize} weights`);
    form.elements.outlier.setAttribute("aria-valuetext", outlier ? `at ${outlier}` : "none");
    document.getElementById("levels-block").textContent = blockSize;
    document.getElementById("levels-outlier").textContent = outlier || "none";
    summary.textContent = described(found);
    announce(summary.textContent);
  }

  // One drawing per frame, however fast the pointer moves.
  let drawing = false;
  function drawSoon() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      draw();
    });
  }

  function change(i, height) {
    bars[i] = clamp(height);
    form.elements.shape.value = "own";
    drawSoon();
  }

  function pressed(event, i) {
    const { key } = event;
    if (key in KEYS) change(i, bars[i] + KEYS[key]);
    else if (key === "ArrowLeft" || key === "ArrowRight") {
      const next = Math.min(BARS - 1, Math.max(0, i + (key === "ArrowLeft" ? -1 : 1)));
      handles[next].focus();
      drawBars(width);
    } else return;
    event.preventDefault();
  }

  // Dragging paints: every bar that the pointer crosses gets its height.
  let last = null;
  function paint(event) {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left - LEFT) / (width - 2 * LEFT)) * BARS;
    const i = Math.min(BARS - 1, Math.max(0, Math.floor(at)));
    const height = clamp((HISTOGRAM - (event.clientY - box.top)) / (HISTOGRAM - 4));
    const from = last ?? { i, height };
    const steps = Math.abs(i - from.i);
    for (let step = 0; step <= steps; step++) {
      const share = steps ? step / steps : 1;
      change(Math.round(from.i + share * (i - from.i)), from.height + share * (height - from.height));
    }
    last = { i, height };
  }
  histogram.addEventListener("pointerdown", (event) => {
    histogram.setPointerCapture(event.pointerId);
    event.preventDefault();
    paint(event);
  });
  histogram.addEventListener("pointermove", (event) => {
    if (last) paint(event);
  });
  for (const end of ["pointerup", "pointercancel"]) histogram.addEventListener(end, () => (last = null));

  form.addEventListener("input", (event) => {
    const shape = SHAPES_OF_WEIGHTS[form.elements.shape.value];
    if (event.target.name === "shape" && shape) bars = [...shape];
    drawSoon();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  atWidth(plot, (found) => {
    width = found;
    draw();
  });
})();
