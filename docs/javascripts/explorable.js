// What the explorables share: elements, numbers as text, drawing at the width that there is.

const Explorable = (() => {
  function fill(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const element = (tag, attributes = {}, ...children) =>
    fill(document.createElement(tag), attributes, children);

  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // Text of a picture: x is where its anchor is.
  const text = (x, y, anchor, words, kind = "") =>
    svg("text", { x, y, "text-anchor": anchor, class: kind }, words);

  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

  // Calls draw(width) when the box has a width, and when it has another one.
  function atWidth(box, draw) {
    let width = 0;
    new ResizeObserver(() => {
      if (box.clientWidth !== width) draw((width = box.clientWidth));
    }).observe(box);
  }

  // For screen readers: says the last text, once the reader rests.
  function announcer(region) {
    let waiting = 0;
    return (words) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => (region.textContent = words), 500);
    };
  }

  return { element, svg, text, percent, atWidth, announcer };
})();
