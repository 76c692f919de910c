JSON.parse(document.getElementById("figures").textContent).forEach((figure, i) =>
  Plotly.newPlot("plot-" + i, figure.data, figure.layout, {responsive: true, displayModeBar: false}));
