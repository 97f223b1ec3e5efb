// Formulas: MathJax is fetched, from this site, by the pages that have one. It needs no other file.
if (document.querySelector(".arithmatex")) {
  window.MathJax = {
    tex: {
      inlineMath: [["\\(", "\\)"]],
      displayMath: [["\\[", "\\]"]],
      packages: { "[-]": ["autoload", "require", "noundefined"] }, // they fetch files, and hide what is misspelt
    },
    options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
  };
  const script = document.createElement("script");
  script.src = new URL("tex-svg.js", document.currentScript.src).href;
  document.head.append(script);
}
