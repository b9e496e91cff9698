"use strict";
// Shows a schedule: `story` is what `animation.py` made of it. Nothing is loaded, nothing is kept.

const story = JSON.parse(document.getElementById("story").textContent);
const counted = new Map(); // bits of masks
const $ = (id) => document.getElementById(id);
const { size, units } = story;
const masks = story.masks.map((hex) => BigInt("0x" + hex));
const transfers = story.transfers.map(([sender, receiver, start, stop, reduce, round, taken, begin, end, carried]) => ({
  sender, receiver, start, stop, reduce, round, taken, begin, end,
  carried: (u) => masks[Array.isArray(carried) ? carried[u - start] : carried],
  bytes: sum(story.unit_bytes.slice(start, stop)),
}));
const byTaken = [...transfers].sort((a, b) => a.taken - b.taken);
{ // what a rank adds to one chunk in one round it adds together, in rank order, once all of it has come
  const folds = new Map();
  const name = (one) => `${one.receiver} ${one.taken} ${one.start}`;
  for (const one of transfers) folds.set(name(one), Math.max(folds.get(name(one)) || 0, one.end));
  for (const one of transfers) one.done = folds.get(name(one));
}
const byEnd = [...transfers].sort((a, b) => a.done - b.done);
const whole = story.sources.map((index) => masks[index]);
const wanted = story.wants.map((list) => new Set(list));
const reduces = whole.some((mask) => bits(mask) > 1);
const roundEnds = Array.from({ length: story.rounds }, () => 0);
for (const one of transfers) roundEnds[one.taken] = Math.max(roundEnds[one.taken], one.end);
for (let k = 1; k < story.rounds; k++) roundEnds[k] = Math.max(roundEnds[k], roundEnds[k - 1]);

const view = { clock: "rounds", at: 0, playing: false, speed: 1, unit: null, rank: null, layout: null, hits: [] };

function sum(values) { return values.reduce((a, b) => a + b, 0); }
function bits(mask) {
  if (!counted.has(mask)) {
    let n = 0;
    for (let rest = mask; rest; rest &= rest - 1n) n++;
    counted.set(mask, n);
  }
  return counted.get(mask);
}
function ranksOf(mask) { return Array.from({ length: size }, (_, r) => r).filter((r) => (mask >> BigInt(r)) & 1n); }
function length() { return view.clock === "rounds" ? story.rounds : story.seconds; }
function chunk(one) { return one.stop === one.start + 1 ? `${one.start}` : `${one.start}–${one.stop - 1}`; }
function amount(bytes) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"]])
    if (bytes >= unit) return `${+(bytes / unit).toPrecision(3)} ${name}`;
  return `${bytes} B`;
}
function duration(seconds) {
  return seconds >= 1 ? `${seconds.toPrecision(4)} s` : seconds >= 1e-3 ? `${(seconds * 1e3).toPrecision(4)} ms`
    : `${(seconds * 1e6).toPrecision(4)} µs`;
}
function list(ranks) {
  if (ranks.length === size && size > 2) return "all ranks";
  return (ranks.length > 1 ? "ranks " : "rank ") + (ranks.length > 8 ? `${ranks.slice(0, 7).join(", ")}, …` : ranks.join(", "));
}

// ------------------------------------------------------------------ what each rank holds

const start = Array.from({ length: size }, (_, r) =>
  whole.map((mask) => ((mask >> BigInt(r)) & 1n ? 1n << BigInt(r) : 0n)));
let held = null;

let replayed = {};

/** What is over at the place in view, replayed from the start. */
function replay() {
  const over = view.clock === "rounds" ? (one) => one.taken + 1 <= view.at : (one) => one.done <= view.at * (1 + 1e-12);
  const place = view.clock === "rounds" ? `${Math.floor(view.at)}` : `${view.at}s`;
  if (place === replayed.place) return replayed.done;
  held = start.map((of) => [...of]);
  const done = [];
  for (const one of view.clock === "rounds" ? byTaken : byEnd) {
    if (!over(one)) continue;
    done.push(one);
    for (let u = one.start; u < one.stop; u++)
      held[one.receiver][u] = one.reduce ? held[one.receiver][u] | one.carried(u) : one.carried(u);
  }
  replayed = { place, done };
  return done;
}
function underWay() {
  if (view.clock === "rounds") {
    return transfers.filter((one) => one.round < view.at && view.at < one.taken + 1)
      .map((one) => [one, Math.min(1, view.at - one.round)]); // one that came early waits at its receiver
  }
  return transfers.filter((one) => one.begin <= view.at && view.at < one.done)
    .map((one) => [one, Math.min(1, (view.at - one.begin) / (one.end - one.begin))]);
}

// ------------------------------------------------------------------ where ranks stand

/** For each unit, from whom its value goes to whom while it is summed (or spread): one tree for each unit, or none. */
function treeOf(u) {
  const up = transfers.filter((one) => (reduces ? one.reduce : true) && one.start <= u && u < one.stop);
  const parent = new Map();
  for (const one of up) {
    const [child, over] = reduces ? [one.sender, one.receiver] : [one.receiver, one.sender];
    if (parent.has(child) && parent.get(child) !== over) return null;
    parent.set(child, over);
  }
  const depth = (r, left = size) => (parent.has(r) && left > 0 ? 1 + depth(parent.get(r), left - 1) : 0);
  return parent.size ? { parent, depth: Array.from({ length: size }, (_, r) => depth(r)) } : null;
}
function trees() {
  const found = [];
  const numbers = [];
  for (let u = 0; u < units; u++) {
    const tree = treeOf(u);
    if (!tree) return null;
    const name = JSON.stringify([...tree.parent].sort((a, b) => a[0] - b[0]));
    let number = found.findIndex((one) => one.name === name);
    if (number < 0) number = found.push({ name, ...tree }) - 1;
    numbers.push(number);
    if (found.length > 2) return null;
  }
  const children = (tree) => Math.max(...[...tree.parent.values()].map((over) => [...tree.parent.values()].filter((x) => x === over).length));
  return found.every((tree) => Math.max(...tree.depth) >= 2 && children(tree) >= 2) ? { found, numbers } : null;
}
const forest = trees();
const layouts = { circle: "a ring", row: "a row", ...(story.grid ? { grid: `a grid ${story.grid.join("×")}` } : {}),
  ...(forest ? { trees: forest.found.length > 1 ? "two trees" : "a tree" } : {}) };
view.layout = story.grid && story.grid.filter((extent) => extent > 1).length > 1 ? "grid" : forest ? "trees" : "circle";

/** The middle of each rank's card, its size, and where messages of a unit leave from. */
function places(width, height) {
  const at = [];
  let cell;
  if (view.layout === "circle") {
    const rx = width / 2, ry = height / 2;
    const round = (r) => {
      const angle = (2 * Math.PI * r) / size - Math.PI / 2, far = size > 1 ? 1 : 0;
      return [rx + far * (Math.min(rx, 1.4 * ry) - cell * 0.6 - 6) * Math.cos(angle), ry + far * (ry - cell * 0.5 - 6) * Math.sin(angle)];
    };
    const apart = (a, b) => Math.max(Math.abs(a[0] - b[0]), Math.abs(a[1] - b[1])) > cell * 1.12;
    cell = Math.min(130, height / 3.2);
    while (size > 1 && cell > 8 && !Array.from({ length: size }, (_, r) => apart(round(r), round((r + 1) % size))).every(Boolean))
      cell *= 0.95;
    for (let r = 0; r < size; r++) at.push(round(r));
  } else if (view.layout === "grid") {
    const across = story.grid[0], deep = story.grid.slice(2).reduce((a, b) => a * b, 1), down = story.grid[1] || 1;
    const columns = across * deep + (deep - 1) * 0.5;
    cell = Math.min(130, width / (columns * 1.5), height / (down * 1.5));
    for (let r = 0; r < size; r++) {
      const x = r % across, y = Math.floor(r / across) % down, z = Math.floor(r / (across * down));
      at.push([width * (z * (across + 0.5) + x + 0.5) / columns, height * (y + 0.5) / down]);
    }
  } else {
    cell = Math.min(120, width / (size * 1.15));
    const y = view.layout === "row" ? height - cell * 0.6 - 8 : forest.found.length > 1 ? height / 2 : height - cell * 0.6 - 8;
    for (let r = 0; r < size; r++) at.push([width * (r + 0.5) / size, y]);
  }
  const high = Math.min(cell, height / 3);
  const leaves = (r, u) => {
    if (view.layout !== "trees") return at[r];
    const number = forest.numbers[u], tree = forest.found[number], down = number === 1;
    const room = (down ? height - at[r][1] : at[r][1]) - high / 2 - 32;
    const far = high / 2 + 18 + room * (1 - tree.depth[r] / Math.max(...tree.depth));
    return [at[r][0], at[r][1] + (down ? far : -far)];
  };
  return { at, wide: cell, high, leaves };
}

// ------------------------------------------------------------------ drawing

const probe = document.createElement("span");
probe.style.display = "none";
document.body.append(probe);
let ink = {};
function readInk() {
  for (const name of ["paper", "ink", "soft", "card", "line", "empty", "add", "put", "done"]) {
    probe.style.color = `var(--${name})`;
    ink[name] = getComputedStyle(probe).color;
  }
  ink.dark = matchMedia("(prefers-color-scheme: dark)").matches !== (document.documentElement.dataset.theme !== undefined
    && document.documentElement.dataset.theme !== (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
}
function colour(rank) { return `hsl(${(360 * rank) / size} ${ink.dark ? "55% 58%" : "62% 52%"})`; }

function paper(canvas, height) {
  const width = canvas.clientWidth, scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}

/** One unit: as many parts as there are contributions, each in the colour of its rank. */
function drawUnit(pen, mask, u, x, y, wide, high) {
  pen.fillStyle = ink.empty;
  pen.fillRect(x, y, wide, high);
  const all = ranksOf(whole[u]), parts = all.length;
  if (parts * 1.5 <= wide) {
    all.forEach((rank, i) => {
      if (!((mask >> BigInt(rank)) & 1n)) return;
      pen.fillStyle = colour(rank);
      pen.fillRect(x + (wide * i) / parts, y, Math.ceil((wide / parts) * 2) / 2, high);
    });
  } else if (mask) {
    pen.fillStyle = colour(ranksOf(mask)[0]);
    pen.fillRect(x, y, (wide * bits(mask)) / parts, high);
  }
}
function drawCard(pen, rank, [x, y], wide, high) {
  const left = x - wide / 2, top = y - high / 2, chosen = view.rank === rank;
  pen.fillStyle = ink.card;
  pen.strokeStyle = chosen ? ink.put : ink.line;
  pen.lineWidth = chosen ? 2 : 1;
  pen.beginPath();
  pen.roundRect(left, top, wide, high, 5);
  pen.fill();
  pen.stroke();
  const head = high > 44 ? 17 : 0, inset = wide > 30 ? 5 : 2;
  if (head) {
    const complete = wanted[rank].size > 0 && [...wanted[rank]].every((u) => held[rank][u] === whole[u]);
    pen.fillStyle = complete ? ink.done : ink.ink;
    pen.font = "600 12px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.fillText(`${wide > 62 ? "rank " : ""}${rank}${complete ? " ✓" : ""}`, left + inset, top + 13);
  }
  const room = high - head - inset, across = Math.max(1, Math.ceil(units / Math.max(1, Math.floor(room / 5))));
  const down = Math.ceil(units / across), w = (wide - 2 * inset) / across, h = room / down;
  for (let u = 0; u < units; u++) {
    const cx = left + inset + (u % across) * w, cy = top + head + Math.floor(u / across) * h;
    pen.globalAlpha = view.unit === null || view.unit === u ? 1 : 0.18;
    drawUnit(pen, held[rank][u], u, cx, cy, w - (across > 1 ? 1 : 0), h - (h > 3 ? 1 : 0));
    pen.globalAlpha = 1;
  }
  view.hits.push([left, top, wide, high, rank]);
}
function drawStage() {
  const width = $("stage").clientWidth;
  const [pen] = paper($("stage"), Math.max(300, Math.min(560, width * 0.62, innerHeight * 0.62)));
  const height = parseFloat($("stage").style.height);
  const { at, wide, high, leaves } = places(width, height);
  view.hits = [];
  if (view.layout === "trees") drawTrees(pen, at, high, leaves);
  const moving = underWay().filter(([one]) => view.unit === null || (one.start <= view.unit && view.unit < one.stop));
  const ways = moving.map(([one, part]) => [one, part, way(one, at, leaves)]);
  for (const [one, , points] of ways) drawWay(pen, points, one.reduce ? ink.add : ink.put);
  at.forEach((place, rank) => drawCard(pen, rank, place, wide, high));
  for (const [one, part, points] of ways) drawMessage(pen, one, along(points, ease(part)), Math.min(54, wide * 0.6));
}
function ease(part) { return view.clock === "rounds" ? part * part * (3 - 2 * part) : part; }
function drawTrees(pen, at, high, leaves) {
  forest.found.forEach((tree, number) => {
    const u = forest.numbers.indexOf(number);
    pen.globalAlpha = view.unit === null || forest.numbers[view.unit] === number ? 1 : 0.2;
    pen.strokeStyle = ink.line;
    pen.lineWidth = 1.5;
    for (const [child, over] of tree.parent) drawLine(pen, leaves(child, u), leaves(over, u));
    pen.setLineDash([2, 4]);
    for (let r = 0; r < size; r++) drawLine(pen, leaves(r, u), at[r]);
    pen.setLineDash([]);
    for (let r = 0; r < size; r++) {
      const [x, y] = leaves(r, u);
      pen.fillStyle = colour(r);
      pen.beginPath();
      pen.arc(x, y, 9, 0, 7);
      pen.fill();
      pen.fillStyle = "#fff";
      pen.font = "600 10px system-ui, sans-serif";
      pen.textAlign = "center";
      pen.fillText(r, x, y + 3.5);
    }
    pen.globalAlpha = 1;
  });
}
function drawLine(pen, [ax, ay], [bx, by]) {
  pen.beginPath();
  pen.moveTo(ax, ay);
  pen.lineTo(bx, by);
  pen.stroke();
}
/** A curve from the sender to the receiver: bent, so that the two directions of a link lie apart. */
function way(one, at, leaves) {
  const [from, to] = view.layout === "trees" ? [leaves(one.sender, one.start), leaves(one.receiver, one.start)]
    : [at[one.sender], at[one.receiver]];
  const dx = to[0] - from[0], dy = to[1] - from[1], far = Math.hypot(dx, dy) || 1;
  const bend = view.layout === "row" ? -Math.sign(dx) * far * 0.38 : view.layout === "trees" ? 12 : Math.min(50, far * 0.5);
  return [from, [(from[0] + to[0]) / 2 - (dy / far) * bend * (view.layout === "row" ? 0 : 1),
    (from[1] + to[1]) / 2 + (view.layout === "row" ? -Math.abs(bend) * 1.5 : (dx / far) * bend)], to];
}
function along([a, b, c], t) {
  return [0, 1].map((i) => (1 - t) ** 2 * a[i] + 2 * t * (1 - t) * b[i] + t * t * c[i]);
}
function drawWay(pen, [a, b, c], ink_) {
  pen.strokeStyle = ink_;
  pen.lineWidth = 1.5;
  pen.globalAlpha = 0.55;
  pen.beginPath();
  pen.moveTo(...a);
  pen.quadraticCurveTo(...b, ...c);
  pen.stroke();
  pen.globalAlpha = 1;
}
function drawMessage(pen, one, [x, y], wide) {
  if (wide < 24) {
    pen.fillStyle = one.reduce ? ink.add : ink.put;
    pen.fillRect(x - wide / 3, y - wide / 3, wide / 1.5, wide / 1.5);
    return;
  }
  const count = one.stop - one.start, bar = count > 1 ? 4 : 8;
  const shown = Math.min(count, 5), high = shown * bar + 16;
  pen.fillStyle = ink.card;
  pen.strokeStyle = one.reduce ? ink.add : ink.put;
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.roundRect(x - wide / 2, y - high / 2, wide, high, 4);
  pen.fill();
  pen.stroke();
  for (let i = 0; i < shown; i++) {
    const u = one.start + i;
    drawUnit(pen, one.carried(u), u, x - wide / 2 + 3, y - high / 2 + 14 + i * bar, wide - 6, bar - 1);
  }
  pen.fillStyle = pen.strokeStyle;
  pen.font = "600 10px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.fillText(`${one.reduce ? "+" : "="}${chunk(one)}`, x, y - high / 2 + 11);
}
function clockSeconds() {
  if (view.clock === "time") return view.at;
  const round = Math.floor(view.at), before = round > 0 ? roundEnds[round - 1] : 0;
  return round >= story.rounds ? story.seconds : before + (view.at - round) * (roundEnds[round] - before);
}
function drawTimes(done) {
  const over = new Set(done), sending = new Set(underWay().map(([one]) => one));
  const row = Math.max(3, Math.min(18, 260 / size)), [pen, width] = paper($("times"), row * size + 22);
  const left = 30, scale = (width - left - 8) / (story.seconds || 1), now = clockSeconds();
  pen.font = "10px system-ui, sans-serif";
  for (let r = 0; r < size; r++)
    if (row >= 9 || r % 8 === 0) {
      pen.fillStyle = ink.soft;
      pen.textAlign = "right";
      pen.fillText(r, left - 5, r * row + row / 2 + 6.5);
    }
  for (const one of transfers) {
    pen.fillStyle = one.reduce ? ink.add : ink.put;
    const plain = view.unit === null || (one.start <= view.unit && view.unit < one.stop);
    pen.globalAlpha = (over.has(one) ? 1 : sending.has(one) ? 0.75 : 0.25) * (plain ? 1 : 0.2);
    pen.fillRect(left + one.begin * scale, one.sender * row + 3, Math.max(1, (one.end - one.begin) * scale - 1), row - 2);
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = ink.ink;
  pen.lineWidth = 1;
  if (view.clock === "time") drawLine(pen, [left + now * scale, 0], [left + now * scale, row * size + 6]);
  pen.fillStyle = ink.soft;
  pen.textAlign = "left";
  pen.fillText("0", left, row * size + 17);
  pen.textAlign = "right";
  pen.fillText(duration(story.seconds), width - 8, row * size + 17);
}
function drawLinks(done) {
  const side = Math.min(330, $("links").clientWidth), [pen] = paper($("links"), side);
  const most = new Map(), now = new Map();
  const add = (table, one) => table.set(one.sender * size + one.receiver, (table.get(one.sender * size + one.receiver) || 0) + one.bytes);
  for (const one of transfers) add(most, one);
  for (const one of done) add(now, one);
  const top = Math.max(1, ...most.values()), margin = size <= 16 ? 18 : 4, cell = (side - margin - 4) / size;
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = "center";
  for (let r = 0; r < size && margin > 4; r++) {
    pen.fillStyle = ink.soft;
    pen.fillText(r, margin + (r + 0.5) * cell, 12);
    pen.fillText(r, 9, margin + (r + 0.5) * cell + 3.5);
  }
  for (let s = 0; s < size; s++)
    for (let r = 0; r < size; r++) {
      const all = most.get(s * size + r);
      pen.fillStyle = all ? ink.empty : ink.paper;
      pen.fillRect(margin + r * cell, margin + s * cell, cell - 1, cell - 1);
      if (!all) continue;
      pen.globalAlpha = (now.get(s * size + r) || 0) / top;
      pen.fillStyle = ink.put;
      pen.fillRect(margin + r * cell, margin + s * cell, cell - 1, cell - 1);
      pen.globalAlpha = 1;
    }
  const [pair, bytes] = [...most].reduce((a, b) => (b[1] > a[1] ? b : a), [0, 0]);
  const even = [...most.values()].every((one) => one === bytes);
  $("busiest").textContent = !bytes ? "No link is used." : even ? `${most.size} links are used; each carries ${amount(bytes)}.`
    : `${most.size} links are used; the busiest, such as ${Math.floor(pair / size)} → ${pair % size}, carry ${amount(bytes)}.`;
}

// ------------------------------------------------------------------ words

function tellRound(done) {
  const now = underWay().map(([one]) => one);
  const round = Math.floor(view.at);
  const shown = now.length ? now : view.clock === "rounds" && round < story.rounds ? transfers.filter((one) => one.round === round) : [];
  const lines = [];
  if (view.at >= length()) lines.push(`<b>It is done.</b> Every rank has what ${story.collective} promises.`);
  else if (view.clock === "rounds") lines.push(`<b>Round ${round + 1} of ${story.rounds}.</b>`);
  if (shown.length) {
    const added = shown.filter((one) => one.reduce), largest = Math.max(...shown.map((one) => one.bytes));
    lines.push(`${shown.length} message${shown.length > 1 ? "s" : ""} of ${shown.length > 1 ? "up to " : ""}${amount(largest)}: ` +
      (added.length === shown.length ? "each is added to what its receiver has."
        : added.length ? `${added.length === 1 ? "one is" : `${added.length} are`} added, the others put in place.` : "each replaces what its receiver has."));
  }
  const rank = view.rank ?? 0;
  const its = shown.filter((one) => one.sender === rank || one.receiver === rank);
  for (const one of its.slice(0, 5)) {
    const carried = Array.from({ length: one.stop - one.start }, (_, i) => one.carried(one.start + i));
    const ranks = ranksOf(carried.reduce((a, b) => a | b)), alike = carried.every((mask) => mask === carried[0]);
    const from = !alike ? `of ${list(ranks)}, one by one` : reduces && ranks.length > 1 ? `the sum of ${list(ranks)}` : `of ${list(ranks)}`;
    lines.push(one.sender === rank ? `Rank ${rank} sends chunk ${chunk(one)} (${from}) to rank ${one.receiver}.`
      : `Rank ${rank} ${one.reduce ? "adds" : "takes"} chunk ${chunk(one)} (${from}) from rank ${one.sender}.`);
  }
  if (its.length > 5) lines.push(`Rank ${rank} has ${its.length - 5} more messages in it.`);
  if (view.unit !== null) {
    const there = held.map((of, r) => [r, bits(of[view.unit])]).filter(([, n]) => n === bits(whole[view.unit])).map(([r]) => r);
    lines.push(`Chunk ${view.unit} is whole on ${there.length ? list(there) : "no rank"}.`);
  }
  const told = lines.map((line) => `<p>${line}</p>`).join("");
  if ($("told").dataset.told !== told) {
    $("told").dataset.told = told; // so that a screen reader hears it once
    $("told").innerHTML = told;
  }
  const sent = new Map(), count = new Map();
  for (const one of done) {
    sent.set(one.sender, (sent.get(one.sender) || 0) + one.bytes);
    count.set(one.sender, (count.get(one.sender) || 0) + 1);
  }
  const whatIs = held.map((of, r) => [...wanted[r]].filter((u) => of[u] === whole[u]).length);
  const rows = [["time", duration(clockSeconds())], ["of all", duration(story.seconds)],
    ["messages sent", `${done.length} of ${transfers.length}`],
    ["by the busiest rank", Math.max(0, ...count.values())],
    ["bytes sent by the busiest rank", amount(Math.max(0, ...sent.values()))],
    ["chunks that are whole", `${sum(whatIs)} of ${sum(wanted.map((one) => one.size))}`]];
  $("figures").innerHTML = rows.map(([name, value]) => `<tr><td>${name}</td><td>${value}</td></tr>`).join("");
  $("count").textContent = view.clock === "rounds" ? `${Math.floor(view.at)} / ${story.rounds}` : duration(view.at);
}

function show() {
  const done = replay();
  drawStage();
  drawTimes(done);
  drawLinks(done);
  tellRound(done);
  $("place").max = length();
  $("place").value = view.at;
  $("play").textContent = view.playing ? "❚❚ stop" : "▶︎ play";
}

// ------------------------------------------------------------------ controls

function go(at) { view.at = Math.max(0, Math.min(length(), at)); show(); }
function step(by) {
  pause();
  if (view.clock === "rounds") return go(by > 0 ? Math.floor(view.at) + 1 : Math.ceil(view.at) - 1);
  const all = [0, ...new Set([...roundEnds, story.seconds])];
  go(by > 0 ? all.find((one) => one > view.at) ?? story.seconds : all.findLast((one) => one < view.at) ?? 0);
}
let last = 0;
function frame(now) {
  if (!view.playing) return;
  const rate = view.clock === "rounds" ? 1 / 1.4 : story.seconds / Math.max(6, 1.2 * Math.min(30, story.rounds));
  const passed = Math.min(0.1, (now - last) / 1e3);
  last = now;
  go(view.at + passed * rate * view.speed);
  if (view.at >= length()) pause();
  else requestAnimationFrame(frame);
}
function play() {
  if (view.at >= length()) view.at = 0;
  view.playing = true;
  last = performance.now();
  requestAnimationFrame(frame);
}
function pause() { view.playing = false; show(); }
function follow(unit) { view.unit = unit; $("unit").value = unit ?? ""; show(); }
function choose(rank) { view.rank = rank; $("rank").value = rank ?? ""; show(); }
function setTheme() {
  const dark = ink.dark ? "light" : "dark";
  document.documentElement.dataset.theme = dark;
  readInk();
  show();
}

$("title").textContent = story.title;
$("summary").textContent = story.summary;
$("model").textContent = story.model;
$("source").textContent = story.source;
$("legend").innerHTML = (reduces ? "Each bar is a chunk of the data; each colour in it the contribution of one rank. A bar full of colours is the whole sum. "
  : "Each bar is a chunk of the data, in the colour of the rank that it comes from. ") +
  '<span class="key" style="background:var(--add)"></span> + added on arrival &nbsp; <span class="key" style="background:var(--put)"></span> = put in place';
for (const [name, label] of Object.entries(layouts)) $("layout").add(new Option(label, name));
$("unit").add(new Option("all chunks", ""));
for (let u = 0; u < units; u++) $("unit").add(new Option(`chunk ${u}`, u));
$("rank").add(new Option("none", ""));
for (let r = 0; r < size; r++) $("rank").add(new Option(r, r));
$("layout").value = view.layout;
$("first").onclick = () => { pause(); go(0); };
$("last").onclick = () => { pause(); go(length()); };
$("back").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("play").onclick = () => (view.playing ? pause() : play());
$("place").oninput = (event) => { view.playing = false; go(+event.target.value); };
$("clock").onchange = (event) => {
  const seconds = clockSeconds(), round = roundEnds.filter((end) => end <= seconds).length;
  view.clock = event.target.value;
  go(view.clock === "time" ? seconds : round);
};
$("speed").onchange = (event) => { view.speed = +event.target.value; };
$("layout").onchange = (event) => { view.layout = event.target.value; show(); };
$("unit").onchange = (event) => follow(event.target.value === "" ? null : +event.target.value);
$("rank").onchange = (event) => choose(event.target.value === "" ? null : +event.target.value);
$("theme").onclick = setTheme;
$("stage").onclick = (event) => {
  const box = $("stage").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const hit = view.hits.find(([left, top, wide, high]) => x >= left && x <= left + wide && y >= top && y <= top + high);
  choose(hit ? hit[4] : null);
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key === " " && ["BUTTON", "SUMMARY"].includes(event.target.tagName)) return; // it presses that
  const keys = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), Home: () => { pause(); go(0); },
    End: () => { pause(); go(length()); }, " ": () => (view.playing ? pause() : play()), t: setTheme, Escape: () => follow(null) };
  const act = keys[event.key] ?? (/^\d$/.test(event.key) && +event.key < units ? () => follow(+event.key) : null);
  if (!act) return;
  event.preventDefault();
  act();
});
for (const name of ["clock", "speed", "layout", "unit", "rank"]) $(name).addEventListener("change", () => $(name).blur());
addEventListener("resize", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readInk(); show(); });
readInk();
{ // #round=3, #clock=time, #unit=0, #layout=row: a place to link to
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.get("clock") === "time") view.clock = $("clock").value = "time";
  if (asked.get("layout") in layouts) view.layout = $("layout").value = asked.get("layout");
  if (/^\d+$/.test(asked.get("unit")) && +asked.get("unit") < units) follow(+asked.get("unit"));
  if (asked.has("theme")) { document.documentElement.dataset.theme = asked.get("theme"); readInk(); }
  go(+asked.get("round") || 0);
}
