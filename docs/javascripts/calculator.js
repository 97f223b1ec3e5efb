// The calculator's page: reads the form, asks memory.js, draws a bar for each phase and a table.

(() => {
  const form = document.getElementById("calculator");
  const bars = document.getElementById("calculator-bars");
  const legend = document.getElementById("calculator-legend");
  const table = document.getElementById("calculator-table");
  const summary = document.getElementById("calculator-summary");
  const PHASES = {
    loading: "Loading",
    loss: "Loss",
    backward: "Backward pass",
    step: "Optimizer step",
  };
  const KINDS = [
    "quantized", "dense", "reading", "adapters", "optimizer", "gradients", "activations", "logits",
  ];
  const METHOD_NAMES = { qlora: "QLoRA", lora: "LoRA on a dense base", full: "full fine-tuning" };
  const NBSP = "\u00a0";

  const percent = (share) => `${(100 * share).toFixed(3)}%`;

  // As minilora.reports.formatting.format_bytes, and never broken into two lines.
  function formatBytes(n) {
    const [size, digits, unit] =
      n < 1e6 ? [n / 1e3, 1, "kB"]
      : n < 1e9 ? [n / 1e6, 1, "MB"]
      : n < 1e12 ? [n / 1e9, 2, "GB"]
      : [n / 1e12, 2, "TB"];
    const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    return size.toLocaleString("en", options) + NBSP + unit;
  }

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // What the form says, or null while a number in it is out of range.
  function settings() {
    if (!form.checkValidity()) return null;
    const value = (name) => form.elements[name].value;
    return {
      model: value("model"),
      method: value("method"),
      r: Number(value("r")),
      batchSize: Number(value("batch")),
      length: Number(value("tokens")),
      c: Number(value("dtype")),
      checkpointing: form.elements.checkpointing.checked,
      dropout: form.elements.dropout.checked,
      accumulate: form.elements.accumulate.checked,
      pagedOptimizer: form.elements.paged.checked,
      efficient: form.elements.efficient.checked,
    };
  }

  function draw() {
    const run = settings();
    const full = form.elements.method.value === "full";
    for (const name of ["r", "dropout", "efficient"]) form.elements[name].disabled = full;
    if (!run) {
      summary.textContent = "A number is out of range.";
      return;
    }
    const gpu = 1e9 * Number(form.elements.gpu.value);
    const found = memory(run);
    const scale = Math.max(found.peak, gpu);
    drawBars(found, scale, gpu);
    drawLegend(found);
    drawTable(found);
    summary.replaceChildren(...described(run, found, gpu));
  }

  function drawBars(found, scale, gpu) {
    bars.replaceChildren();
    for (const [phase, kinds] of Object.entries(found.phases)) {
      const parts = KINDS.filter((kind) => kinds[kind]);
      const spoken = parts.map((kind) => `${kind} ${formatBytes(kinds[kind])}`).join(", ");
      const bar = element("div", {
        class: "bar",
        role: "img",
        "aria-label": `${PHASES[phase]}: ${formatBytes(total(kinds))}: ${spoken}`,
      });
      for (const kind of parts) {
        const title = `${kind} ${formatBytes(kinds[kind])}`;
        const part = element("span", { class: `part ${kind}`, title });
        part.style.width = percent(kinds[kind] / scale);
        bar.append(part);
      }
      const mark = element("span", { class: "gpu", "aria-hidden": "true" });
      mark.style.left = percent(gpu / scale);
      bar.append(mark);
      const name = phase === found.phase ? element("b", {}, PHASES[phase]) : PHASES[phase];
      const label = element("div", { class: "label", "aria-hidden": "true" }, name);
      label.append(element("span", {}, formatBytes(total(kinds))));
      bars.append(label, bar);
    }
  }

  function drawLegend(found) {
    const shown = KINDS.filter((kind) => Object.values(found.phases).some((p) => p[kind]));
    legend.replaceChildren(
      ...shown.map((kind) => element("li", {}, element("span", { class: `part ${kind}` }), kind)),
      element("li", {}, element("span", { class: "gpu" }), "memory of the GPU"),
    );
  }

  function drawTable(found) {
    const phases = Object.values(found.phases);
    const row = (name, cells, scope = "row") =>
      element("tr", {}, element("th", { scope }, name), ...cells);
    const head = Object.values(PHASES).map((name) => element("th", { scope: "col" }, name));
    const cell = (n) => element("td", {}, n ? formatBytes(n) : "–");
    const kinds = KINDS.filter((kind) => phases.some((p) => p[kind]));
    table.replaceChildren(
      element("thead", {}, row("Memory", head, "col")),
      element(
        "tbody",
        {},
        ...kinds.map((kind) => row(kind, phases.map((p) => cell(p[kind])))),
        row("total", phases.map((p) => cell(total(p)))),
      ),
    );
  }

  function described(run, found, gpu) {
    const others = Object.keys(METHOD_NAMES).filter((method) => method !== run.method);
    const compared = others.map(
      (method) => `${METHOD_NAMES[method]} ${formatBytes(memory({ ...run, method }).peak)}`,
    );
    const name = METHOD_NAMES[run.method];
    const card = `a GPU with ${gpu / 1e9}${NBSP}GB`;
    const most = largestBatch(run, gpu);
    const fitting =
      most >= LARGEST_BATCH ? `Batches of ${LARGEST_BATCH} sequences and more fit on ${card}.`
      : most ? `The largest batch that fits on ${card} has ${most} sequence${most > 1 ? "s" : ""}.`
      : `It does not fit on ${card}, not even with one sequence.`;
    const share = ((100 * found.trainable) / found.parameters).toFixed(2);
    return [
      `${name[0].toUpperCase()}${name.slice(1)} needs `,
      element("strong", { id: "calculator-peak" }, formatBytes(found.peak)),
      ` (${PHASES[found.phase].toLowerCase()}). ${fitting}`,
      element("br"),
      `${found.trainable.toLocaleString("en")} of ${found.parameters.toLocaleString("en")} `,
      `parameters are trained (${share}%).`,
      element("br"),
      `For comparison: ${compared.join(", ")}.`,
    ];
  }

  const names = Object.keys(SHAPES).map((name) => element("option", { value: name }, name));
  form.elements.model.replaceChildren(...names);
  form.elements.model.value = "llama-65b";
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
