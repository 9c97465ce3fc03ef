"use strict";
// The point of a chart under the pointer, or that the arrow keys lead to, read out below it.
const LEFT = 52, RIGHT = 448, TOP = 10, BOTTOM = 220;

function watchChart(figure) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const reading = figure.querySelector(".reading"), atRest = reading.textContent;
  const steps = [...new Set(data.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", TOP);
  cursor.setAttribute("y2", BOTTOM);
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    const x = LEFT + (RIGHT - LEFT) * (data.last > data.first ? (step - data.first) / (data.last - data.first) : 0.5);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    svg.append(cursor);
    const values = data.lines.map((line) => {
      const point = line.points.find((one) => one[0] === step);
      return point && `${line.name} ${point[1]}`;
    });
    const place = data.powers ? Number((10 ** step).toPrecision(3)) : step;
    reading.textContent = `${data.along} ${place}: ${values.filter(Boolean).join(", ")}`;
  }

  function rest() {
    at = -1;
    cursor.remove();
    reading.textContent = atRest;
  }

  svg.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = data.first + (data.last - data.first) * (point.x - LEFT) / (RIGHT - LEFT);
    let nearest = 0;
    steps.forEach((one, index) => { if (Math.abs(one - step) < Math.abs(steps[nearest] - step)) nearest = index; });
    show(nearest);
  });
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 20));
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - far, PageDown: at + far, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") rest();
    else if (event.key in moves) { show(moves[event.key]); event.preventDefault(); }
  });
}

// Rows of answers by what became of them, and by a text that they hold.
function watchAnswers(section) {
  const form = section.querySelector(".filter"), rows = [...section.querySelectorAll(".row")];
  const search = form.querySelector("input[type=search]"), button = form.querySelector("button");
  const texts = rows.map((row) => row.textContent.toLowerCase());

  function filter() {
    const word = form.querySelector("input[type=radio]:checked").value, wanted = search.value.toLowerCase();
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = word === "all" || (word === "changed" ? row.dataset.changed === "yes" : row.dataset.mark === word);
      row.hidden = !(fits && texts[index].includes(wanted));
      shown += row.hidden ? 0 : 1;
    });
    form.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  button.addEventListener("click", () => {
    const opens = button.value === "open";
    rows.forEach((row) => { if (!row.hidden) row.open = opens; });
    button.value = opens ? "close" : "open";
    button.textContent = opens ? "close all" : "open all";
  });
  form.hidden = false;
  filter();
}

document.querySelectorAll(".chart").forEach(watchChart);
document.querySelectorAll(".answers").forEach(watchAnswers);
// On paper nothing can be opened.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
