// The map of all photos: draws points, shows the photo under the pointer, leads to its group.
"use strict";

(() => {
  const holder = document.getElementById("map");
  if (!holder) return;
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const pageNames = JSON.parse(document.getElementById("page-names").textContent);
  const thumbnails = document.body.dataset.thumbnails;
  const canvas = holder.querySelector("canvas");
  const tip = document.getElementById("tip");
  const alone = new Set(data.alone);
  const margin = 24;
  let scale = 1, left = 0, top = 0; // what part of the map is shown: places run from 0 to 1
  let near = -1; // the photo under the pointer

  const place = (i) => {
    const wide = canvas.clientWidth - 2 * margin, high = canvas.clientHeight - 2 * margin;
    return [margin + (data.x[i] / 9999 - left) * scale * wide, margin + (data.y[i] / 9999 - top) * scale * high];
  };
  const color = (group) => alone.has(group) ? "hsl(40 4% 58% / .7)" : `hsl(${(group * 137.508) % 360} 58% ${47 + 10 * (group % 2)}% / .85)`;

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const radius = Math.min(7, (data.x.length > 4000 ? 2.2 : data.x.length > 800 ? 3.2 : 4.5) * Math.sqrt(scale));
    const point = (i, size) => { const [x, y] = place(i); pen.beginPath(); pen.arc(x, y, size, 0, 7); pen.fill(); };
    for (let i = 0; i < data.x.length; i++) { pen.fillStyle = color(data.group[i]); point(i, radius); }
    if (near < 0) return;
    const group = data.group[near];
    pen.strokeStyle = getComputedStyle(document.body).color;
    for (let i = 0; i < data.x.length; i++) {
      if (data.group[i] !== group) continue;
      pen.fillStyle = color(group);
      point(i, radius + (i === near ? 3 : 1));
      pen.stroke();
    }
  }

  function nearest(event) {
    let best = -1, least = 14 * 14;
    for (let i = 0; i < data.x.length; i++) {
      const [x, y] = place(i), away = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (away < least) { least = away; best = i; }
    }
    return best;
  }

  function point(event) {
    const found = nearest(event);
    if (found !== near) {
      near = found;
      tip.hidden = near < 0;
      draw();
      if (near < 0) return;
      const id = data.id[near];
      tip.querySelector("img").src = `${thumbnails}/${id.slice(0, 2)}/${id}.jpg`;
      tip.querySelector("figcaption").textContent = `Group ${data.group[near]}: ${data.name[near]}`;
    }
    const right = event.offsetX > canvas.clientWidth / 2, below = event.offsetY > canvas.clientHeight / 2;
    tip.style.left = `${event.offsetX + (right ? -216 : 16)}px`;
    tip.style.top = `${Math.max(4, event.offsetY + (below ? -220 : 16))}px`;
  }

  function zoom(event) {
    event.preventDefault();
    const wide = canvas.clientWidth - 2 * margin, high = canvas.clientHeight - 2 * margin;
    const next = Math.min(40, Math.max(1, scale * Math.exp(-event.deltaY / 400)));
    const x = (event.offsetX - margin) / wide, y = (event.offsetY - margin) / high;
    left += x / scale - x / next;
    top += y / scale - y / next;
    scale = next;
    if (scale === 1) left = top = 0;
    draw();
  }

  function open(event) {
    const found = nearest(event);
    if (found < 0) return;
    const page = data.page[data.group[found]];
    location.href = `${page === 1 ? "" : pageNames[page]}#group-${data.group[found]}`;
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerleave", () => { near = -1; tip.hidden = true; draw(); });
  canvas.addEventListener("wheel", zoom, { passive: false });
  canvas.addEventListener("dblclick", () => { scale = 1; left = top = 0; draw(); });
  canvas.addEventListener("click", open);
  addEventListener("resize", draw);
  draw();
})();
