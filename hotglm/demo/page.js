"use strict";
// Points at the request under the pointer, and at the mark that belongs to a line of a list. The page is whole without it.
for (const chart of document.querySelectorAll(".chart")) {
  const scale = Object.fromEntries(Object.entries(chart.dataset).map(([name, text]) => [name, Number(text)]));
  const tip = document.getElementById("tip");
  let dots = null;

  const readDots = () =>
    [...chart.querySelectorAll(".dots")].flatMap((path) => {
      const shift = path.classList.contains("torn") ? 4 : 0;
      return [...path.getAttribute("d").matchAll(/M([\d.]+) ([\d.]+)/g)].map(([, x, y]) => ({
        x: Number(x) + shift,
        y: Number(y) + shift,
        client: path.dataset.client,
        version: path.dataset.version,
      }));
    });

  const describe = (dot) => {
    const at = ((dot.x - scale.left) / scale.width) * scale.seconds;
    const share = (scale.top + scale.height - dot.y) / scale.height;
    const latency = scale.low * (scale.high / scale.low) ** share;
    return `client ${dot.client}, ${dot.version}, ${latency.toPrecision(2)} ms at ${at.toFixed(2)} s`;
  };

  chart.addEventListener("pointermove", (event) => {
    dots ??= readDots();
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    let nearest = null;
    let least = 12 ** 2;
    for (const dot of dots) {
      const distance = (dot.x - point.x) ** 2 + (dot.y - point.y) ** 2;
      if (distance < least) [nearest, least] = [dot, distance];
    }
    tip.hidden = nearest === null;
    if (nearest) {
      tip.textContent = describe(nearest);
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${event.clientY - 34}px`;
    }
  });
  chart.addEventListener("pointerleave", () => (tip.hidden = true));
}

for (const item of document.querySelectorAll(".panel li")) {
  const mark = item.closest(".panel").querySelector(`.moment[data-moment="${item.dataset.moment}"]`);
  item.addEventListener("pointerenter", () => mark.classList.add("lit"));
  item.addEventListener("pointerleave", () => mark.classList.remove("lit"));
}
