// Draws the charts of the page, in the colours of the reader's choice, light or dark.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches || matchMedia("(max-width: 40rem)").matches;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // What depends on light or dark, as plotly's keys.
  const theme = () => {
    const [ink, line, surface] = ["--ink", "--line", "--surface"].map(colour);
    const axis = (name) => ({ [`${name}.gridcolor`]: line, [`${name}.linecolor`]: line, [`${name}.tickcolor`]: line });
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": ink,
      "hoverlabel.bgcolor": surface,
      "hoverlabel.font.color": ink,
      "hoverlabel.bordercolor": line,
      "modebar.color": colour("--quiet"),
      "modebar.activecolor": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      ...axis("xaxis"),
      ...axis("yaxis"),
    };
  };

  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: true,
    scrollZoom: false,
    // By name, for the library's own choice has a button that sends the data to its maker.
    modeBarButtons: [["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"], ["toImage"]],
  };

  for (const figure of figures) {
    const place = document.getElementById(figure.key);
    const layout = { ...figure.layout, font: { family: colour("--font"), size: 13 } };
    // On a touch screen a finger on a chart scrolls the page; the buttons above the chart zoom.
    layout.dragmode = touch ? false : "zoom";
    if (touch) layout.margin = { ...layout.margin, l: 44, r: 8, t: 36 };
    Plotly.newPlot(place, figure.data, layout, config)
      .then(() => Plotly.relayout(place, theme()))
      .then(() => { place.dataset.drawn = "yes"; });
  }

  dark.addEventListener("change", () => figures.forEach((figure) => Plotly.relayout(figure.key, theme())));

  for (const box of document.querySelectorAll("[data-logarithmic]")) {
    box.addEventListener("change", () =>
      Plotly.relayout(box.dataset.logarithmic, { "yaxis.type": box.checked ? "log" : "linear", "yaxis.autorange": true }));
  }
})();
