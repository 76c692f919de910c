JSON.parse(document.getElementById("figures").textContent).forEach((figure, i) =>
  Plotly.newPlot("plot-" + i, figure.data, figure.layout, {responsive: true, displayModeBar: false}));
const sayWhatScrolls = () => document.querySelectorAll(".scroll").forEach((box) => {
  const ways = [];
  if (box.scrollWidth > box.clientWidth + 1) ways.push("sideways");
  if (box.classList.contains("tall") && box.scrollHeight > box.clientHeight + 1) ways.push("up and down");
  if (ways.length) box.dataset.scrolls = "this table scrolls " + ways.join(" and ");
  else delete box.dataset.scrolls;
});
sayWhatScrolls();
window.addEventListener("resize", sayWhatScrolls);
