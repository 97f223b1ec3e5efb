// The page "How much rank does an update need?": a slider for r, and what is left of a real update.

(() => {
  const { svg, text, percent, atWidth, announcer } = Explorable;
  const form = document.getElementById("rank");
  const spectrum = document.getElementById("rank-spectrum");
  const curve = document.getElementById("rank-losses");
  const summary = document.getElementById("rank-summary");
  const announce = announcer(document.getElementById("rank-status"));

  const { ranks, losses, shape, singularValues } = UPDATE;
  const [U, V, drawn] = [UPDATE.U, UPDATE.V, UPDATE.drawn].map(decodeMatrix);
  const weights = shape[0] * shape[1];
  const HEIGHT = 210;
  const [LEFT, RIGHT, TOP, BOTTOM] = [46, 12, 12, 40];

  const count = (n) => n.toLocaleString("en");
  const rank = () => ranks[form.elements.r.value];

  // Axes: a frame, ticks below and at the left, and what they are.
  function axes(width, said, xTicks, yTicks, label) {
    const made = svg("svg", {
      role: "img",
      viewBox: `0 0 ${width} ${HEIGHT}`,
      height: HEIGHT,
      "aria-label": said,
    });
    for (const [y, words] of yTicks) {
      made.append(
        svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
        text(LEFT - 6, y + 4, "end", words, "soft"),
      );
    }
    for (const [x, words] of xTicks) made.append(text(x, HEIGHT - BOTTOM + 16, "middle", words, "soft"));
    made.append(text((LEFT + width - RIGHT) / 2, HEIGHT - 6, "middle", label, "soft"));
    return made;
  }

  // Where a share between 0 and 1 is, from left to right and from bottom to top.
  const across = (share, width) => LEFT + 8 + share * (width - LEFT - RIGHT - 16);
  const up = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);

  function drawSpectrum(width) {
    const r = rank();
    const top = Math.ceil(Math.log10(singularValues[0]) * 2) / 2;
    const decades = 3;
    const x = (k) => across(Math.log(k) / Math.log(singularValues.length), width);
    const y = (s) => up(1 - (top - Math.log10(s)) / decades);
    const lowest = 10 ** (top - decades);
    const xTicks = [1, 4, 16, 64, 256].map((k) => [x(k), String(k)]);
    const exponents = [0, 1, 2, 3].map((i) => Math.floor(top) - i);
    const yTicks = exponents
      .filter((exponent) => exponent >= top - decades)
      .map((exponent) => [y(10 ** exponent), `${10 ** exponent}`]);
    const said = `${count(singularValues.length)} singular values; the first ${r} are kept. The largest is ${singularValues[0].toPrecision(3)}.`;
    const made = axes(width, said, xTicks, yTicks, "k-th singular value, both axes logarithmic");
    singularValues.forEach((s, i) => {
      if (s < lowest) return;
      const kept = i < r;
      made.append(svg("circle", { class: kept ? "dot kept" : "dot", cx: x(i + 1).toFixed(1), cy: y(s).toFixed(1), r: kept ? 4 : 2 }));
    });
    spectrum.replaceChildren(made);
  }

  function drawLosses(width) {
    const last = ranks.length - 1;
    const [low, high] = [2, 4.5];
    const x = (i) => across(i / last, width);
    const y = (loss) => up((loss - low) / (high - low));
    const labels = [0, 1, 4, 16, 64, 192, 576];
    const xTicks = labels.map((r) => [x(ranks.indexOf(r)), String(r)]);
    const yTicks = [2, 3, 4].map((loss) => [y(loss), String(loss)]);
    const said = `Hold-out loss by rank: ${ranks.map((r, i) => `${r}: ${losses[i].toFixed(2)}`).join(", ")}`;
    const made = axes(width, said, xTicks, yTicks, "rank of all 45 updates");
    const chosen = ranks.indexOf(rank());
    const points = losses.map((loss, i) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`);
    made.append(
      svg("polyline", { class: "curve", points: points.join(" ") }),
      svg("line", { class: "chosen", x1: x(chosen), x2: x(chosen), y1: TOP, y2: HEIGHT - BOTTOM }),
      ...losses.map((loss, i) => {
        const kind = i === chosen ? "dot kept" : "dot";
        return svg("circle", { class: kind, cx: x(i), cy: y(loss), r: i === chosen ? 6 : 3 });
      }),
    );
    curve.replaceChildren(made);
  }

  // Blue is negative, orange positive, and the page's own color zero.
  const largest = Math.max(...drawn.values.map(Math.abs));
  function drawMatrix(id, values, said) {
    const canvas = document.getElementById(id);
    const context = canvas.getContext("2d");
    const image = context.createImageData(drawn.columns, drawn.rows);
    values.forEach((value, i) => {
      const color = value < 0 ? [59, 125, 216] : [194, 112, 28];
      const strength = Math.min(1, (1.6 * Math.abs(value)) / largest);
      image.data.set([...color, 255 * strength], 4 * i);
    });
    context.putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", said);
  }

  function drawMatrices() {
    const r = rank();
    const kept = approximation(U, singularValues, V, r);
    const left = drawn.values.map((value, i) => value - kept[i]);
    drawMatrix("rank-update", drawn.values, "The update, 40 of its rows and columns");
    drawMatrix("rank-kept", kept, `Its best approximation of rank ${r}`);
    drawMatrix("rank-left", left, "The difference of the two");
    document.getElementById("rank-name").textContent = `rank ${r}`;
  }

  function described() {
    const r = rank();
    const loss = losses[ranks.indexOf(r)];
    const parameters = adapterParameters(shape, r);
    const gained = shareOfImprovement(losses, loss);
    return (
      `Rank ${r}: relative error ${percent(relativeError(singularValues, r))}, with ${count(parameters)}` +
      ` parameters instead of ${count(weights)} (${percent(parameters / weights)}). With all` +
      ` ${UPDATE.matrices} updates at rank ${r}, the hold-out loss is ${loss.toFixed(3)}:` +
      ` ${percent(gained)} of the improvement.`
    );
  }

  function draw() {
    const r = rank();
    form.elements.r.setAttribute("aria-valuetext", `rank ${r}`);
    document.getElementById("rank-r").textContent = r;
    drawMatrices();
    drawSpectrum(spectrum.clientWidth);
    drawLosses(curve.clientWidth);
    summary.textContent = described();
    announce(summary.textContent);
  }

  form.elements.r.max = ranks.length - 1;
  form.elements.r.value = ranks.indexOf(8);
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  atWidth(spectrum, draw);
})();
