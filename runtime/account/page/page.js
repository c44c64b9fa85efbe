"use strict";
// The page of one program. `data` is what view.py has written; vendor.js gives `cytoscape` (drawing) and `dagre` (layout).
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FAR = 5; // more readers than this of one value: only the first edge is drawn until one of them is selected
const FIRST = 70; // boxes that are open at first
const state = { stage: data.stages.length - 1, open: new Set(), mode: null, selected: null, query: "" };

// --- text

const html = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const short = (op) => op.replace(/^fused\./, "").replace(/^aten\./, "").replace(/\.(default|Tensor|Scalar|int)$/, "");
const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
function size(bytes) {
  if (bytes === undefined || bytes === null) return "–";
  for (const unit of ["B", "KiB", "MiB"]) {
    if (Math.abs(bytes) < 1024) return `${+bytes.toPrecision(3)} ${unit}`;
    bytes /= 1024;
  }
  return `${+bytes.toPrecision(3)} GiB`;
}
const exact = (number) => (typeof number === "number" ? number.toExponential(2) : number); // "inf", "nan"
function time(seconds) {
  if (seconds === undefined || seconds === null) return "–";
  const [unit, scale] = seconds >= 1 ? ["s", 1] : seconds >= 1e-3 ? ["ms", 1e-3] : ["µs", 1e-6];
  return `${+(seconds / scale).toPrecision(3)} ${unit}`;
}

// --- what is known of an op

const WORDS = {
  fused: "kernel used", slower: "kernel not used", none: "no kernel", near: "near miss", plain: "as recorded",
  added: "new here", removed: "gone in the next", kept: "unchanged", io: "argument, result",
};
const COLOUR = { added: "fused", removed: "none", kept: "plain" };
const nearMisses = new Map(); // recorded value -> refusals
for (const refusal of data.refusals) {
  for (const value of refusal[3]) nearMisses.set(value, [...(nearMisses.get(value) || []), refusal]);
}
// A module's index belongs to its list: model.layers.0 is one step of a path.
function pathOf(module) {
  const path = [];
  let whole = "";
  for (const part of module ? module.split(".") : []) {
    const number = /^\d+$/.test(part) && path.length;
    whole = whole ? `${whole}.${part}` : part;
    if (number) path[path.length - 1] = whole;
    else path.push(whole);
  }
  return path;
}
const nameOf = (group) => (/\.\d+$/.test(group) ? group.split(".").slice(-2).join(".") : group.split(".").pop());
data.nodes.forEach((node, index) => {
  node.id = `n${index}`;
  node.in ??= []; node.out ??= []; node.of ??= []; node.at ??= "";
  const names = new Set(node.of.map((value) => data.ops[value] && data.ops[value][0]).filter(Boolean));
  node.regions = node.region ? [node.region] : [...names];
});
function regionOf(node) {
  const found = node.regions.map((name) => data.regions[name]).filter(Boolean);
  return found.find((region) => region.decision.use) || found[0];
}
function verdict(node) {
  const region = regionOf(node);
  if (region) return region.decision.use ? "fused" : region.kernel ? "slower" : "none";
  return node.of.some((value) => nearMisses.has(value)) ? "near" : "plain";
}
const measured = (region) => (region.decision.use ? region.decision.t_fused : region.decision.t_fallback) || 0;
const saved = (region) => (region.decision.use ? region.bytes[0] - region.bytes[1] : 0);

// --- stages

const stages = data.stages.map((stage, index) => {
  const before = new Set(index ? data.stages[index - 1].nodes : stage.nodes);
  const after = new Set(index + 1 < data.stages.length ? data.stages[index + 1].nodes : stage.nodes);
  const own = new Set(stage.nodes);
  return {
    name: stage.name, nodes: stage.nodes,
    added: stage.nodes.filter((n) => !before.has(n)), removed: [...before].filter((n) => !own.has(n)),
    leaving: new Set(stage.nodes.filter((n) => !after.has(n))),
  };
});
const stage = () => stages[state.stage];
const mode = () => state.mode || (state.stage === stages.length - 1 ? "decision" : "changes");
let groups; // path -> {path, parent, ops, groups} of the current stage
function collect() {
  groups = new Map([["", { path: "", parent: null, ops: [], groups: [], all: [] }]]);
  const counts = new Map();
  for (const index of stage().nodes) for (const path of pathOf(data.nodes[index].at)) counts.set(path, (counts.get(path) || 0) + 1);
  for (const index of stage().nodes) {
    const node = data.nodes[index], whole = pathOf(node.at);
    node.path = whole.filter((path) => counts.get(path) > 1); // a box around one op says nothing
    node.only = node.path.length < whole.length ? nameOf(whole.at(-1)) : "";
    let parent = groups.get("");
    parent.all.push(node);
    for (const path of node.path) {
      if (!groups.has(path)) {
        groups.set(path, { path, parent: parent.path, ops: [], groups: [], all: [] });
        parent.groups.push(path);
      }
      parent = groups.get(path);
      parent.all.push(node);
    }
    parent.ops.push(node);
  }
}
function openFirst() {
  let count = 0, level = [""];
  while (level.length && count < FIRST) {
    const next = level.flatMap((path) => groups.get(path).groups);
    for (const path of next) {
      const group = groups.get(path);
      if (count + group.ops.length + group.groups.length < FIRST && !/\.\d+$/.test(path)) {
        state.open.add(path);
        count += group.ops.length + group.groups.length;
      }
    }
    level = next.filter((path) => state.open.has(path));
  }
  const layer = [...groups.keys()].find((path) => /\.\d+$/.test(path));
  for (const path of groups.keys()) if (layer && (path === layer || path.startsWith(`${layer}.`))) state.open.add(path);
  for (const path of pathOf(layer || "")) state.open.add(path);
}

// --- colours

const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
function ramp(part) {
  const [from, to] = [parseFloat(theme("hot-from")), parseFloat(theme("hot-to"))];
  return `hsl(${theme("hot").replace(" ", ", ")}, ${from + (to - from) * part}%)`;
}
function amount(nodes) {
  const seen = new Set(nodes.map(regionOf).filter(Boolean));
  return [...seen].reduce((sum, region) => sum + (mode() === "time" ? measured(region) : saved(region)), 0);
}
function kindOf(node) {
  if (mode() !== "changes") return verdict(node);
  if (stage().leaving.has(+node.id.slice(1))) return "removed";
  return addedNow.has(node) ? "added" : "kept";
}
let addedNow = new Set(), largest = 0;
function paint(nodes, group) {
  if (mode() === "time" || mode() === "bytes") {
    const part = largest ? Math.sqrt(amount(nodes) / largest) : 0;
    return { fill: part ? ramp(part) : theme("plain"), line: part ? ramp(Math.min(1, part + 0.25)) : theme("plain-line"), strong: part > 0.55 };
  }
  const counts = {};
  for (const node of nodes) counts[kindOf(node)] = (counts[kindOf(node)] || 0) + 1;
  const kinds = Object.keys(counts).sort((a, b) => counts[b] - counts[a]);
  if (!group || kinds.length === 1) {
    const name = COLOUR[kinds[0]] || kinds[0];
    return { fill: theme(name), line: theme(`${name}-line`) };
  }
  const stops = [], colours = [];
  let at = 0;
  for (const kind of Object.keys(WORDS).filter((kind) => counts[kind])) {
    const fill = theme(COLOUR[kind] || kind);
    colours.push(fill, fill);
    stops.push(at, (at += (100 * counts[kind]) / nodes.length));
  }
  return { fill: theme("plain"), line: theme("groupline"), colours: colours.join(" "), stops: stops.map((s) => `${s}%`).join(" ") };
}

// --- the visible graph, laid out by dagre

const pen = document.createElement("canvas").getContext("2d");
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif';
function box(label, weight = 400) {
  pen.font = `${weight} 12px ${FONT}`;
  const lines = label.split("\n");
  return { width: Math.ceil(Math.max(...lines.map((line) => pen.measureText(line).width))) + 24, height: 14 + 17 * lines.length };
}
const shapeOf = (name) => (data.values[name] ? data.values[name][0] : "");
function about(group) {
  const total = mode() === "time" || mode() === "bytes" ? amount(group.all) : 0;
  const more = total ? `  ·  ${mode() === "time" ? time(total) : size(total)}` : "";
  return `${nameOf(group.path)}\n${plural(group.all.length, "op")}${more}`;
}
function visible() {
  const boxes = new Map(), shownAt = new Map(), producer = new Map();
  const add = (id, found) => boxes.set(id, { id, parent: "", nodes: [], ...found });
  for (const path of state.open) {
    if (groups.has(path) && around(path).every((p) => state.open.has(p))) {
      add(path, { label: nameOf(path), parent: groups.get(path).parent, open: true, kind: "open" });
    }
  }
  for (const index of stage().nodes) {
    const node = data.nodes[index];
    const closed = node.path.find((path) => !state.open.has(path));
    const id = closed || node.id;
    if (!boxes.has(id)) {
      const label = closed ? about(groups.get(closed)) : [node.only, node.region || short(node.op), shapeOf(node.out[0])].filter(Boolean).join("\n");
      const parent = closed ? groups.get(closed).parent : node.path.at(-1) || "";
      add(id, { label, parent, nodes: closed ? groups.get(closed).all : [node], kind: closed ? "group" : node.region ? "region" : "op" });
    }
    shownAt.set(node, id);
    for (const value of node.out) producer.set(value, id);
  }
  const edges = new Map(), readers = new Map();
  for (const index of stage().nodes) {
    const node = data.nodes[index], to = shownAt.get(node);
    for (const value of node.in) {
      let from = producer.get(value);
      if (!from && data.inputs.includes(value) && boxes.get(to).kind !== "group") {
        from = `in ${value}`;
        if (!boxes.has(from)) add(from, { label: [value, shapeOf(value)].filter(Boolean).join("\n"), parent: boxes.get(to).parent, kind: "io", value });
        else boxes.get(from).parent = common(boxes.get(from).parent, boxes.get(to).parent);
      }
      if (!from || from === to) continue;
      if (!edges.has(`${from}→${to}`)) {
        edges.set(`${from}→${to}`, { id: `${from}→${to}`, source: from, target: to });
        readers.set(from, [...(readers.get(from) || []), `${from}→${to}`]);
      }
    }
  }
  for (const value of data.outputs) {
    const from = producer.get(value);
    if (!from || boxes.get(from).kind === "group") continue;
    const id = `out ${value}`;
    add(id, { label: "result\n" + (shapeOf(value) || value), parent: boxes.get(from).parent, kind: "io", value });
    edges.set(id, { id: `${from}→${id}`, source: from, target: id });
  }
  for (const ids of readers.values()) if (ids.length > FAR) ids.slice(1).forEach((id) => (edges.get(id).far = true));
  for (const found of boxes.values()) if (!found.open) Object.assign(found, box(found.label));
  return { boxes, edges };
}
const around = (path) => pathOf(path).filter((p) => groups.has(p));
function common(left, right) {
  const [a, b] = [around(left), around(right)];
  return a.filter((path, index) => path === b[index]).at(-1) || "";
}
function layout({ boxes, edges }) {
  const graph = new dagre.graphlib.Graph({ compound: true });
  graph.setGraph({ rankdir: "TB", nodesep: 22, ranksep: 34, edgesep: 12, marginx: 20, marginy: 20 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const found of boxes.values()) graph.setNode(found.id, { width: found.width, height: found.height });
  for (const found of boxes.values()) if (found.parent && boxes.has(found.parent)) graph.setParent(found.id, found.parent);
  for (const edge of edges.values()) if (!edge.far) graph.setEdge(edge.source, edge.target);
  dagre.layout(graph);
  return graph;
}
// dagre's bends, as Cytoscape wants them: how far along the straight line, and how far beside it.
function bends(graph, edge) {
  const { x: x1, y: y1 } = graph.node(edge.source), { x: x2, y: y2 } = graph.node(edge.target);
  const [dx, dy] = [x2 - x1, y2 - y1], length = Math.hypot(dx, dy) || 1;
  const points = graph.edge(edge.source, edge.target).points.slice(1, -1);
  const beside = points.map((p) => ((p.x - x1) * dy - (p.y - y1) * dx) / -length);
  if (beside.every((distance) => Math.abs(distance) < 2)) return {};
  return { weights: points.map((p) => ((p.x - x1) * dx + (p.y - y1) * dy) / length ** 2), beside };
}

// --- drawing

const cy = cytoscape({ container: $("graph"), minZoom: 0.03, maxZoom: 3, boxSelectionEnabled: false, autoungrabify: true });
window.cy = cy; // for a console, and for tests
function styles() {
  return [
    { selector: "node", style: { shape: "round-rectangle", label: "data(label)", "font-family": FONT, "font-size": 12, "line-height": 1.35, color: theme("ink"),
      "text-wrap": "wrap", "text-max-width": 600, "text-valign": "center", "text-halign": "center", "border-width": 1, "corner-radius": 7, "min-zoomed-font-size": 5 } },
    { selector: "node[width]", style: { width: "data(width)", height: "data(height)", "background-color": "data(fill)", "border-color": "data(line)" } },
    { selector: "node[?strong]", style: { color: document.documentElement.classList.contains("dark") ? theme("ink") : "#fff" } },
    { selector: "node[colours]", style: { "background-fill": "linear-gradient", "background-gradient-direction": "to-right",
      "background-gradient-stop-colors": "data(colours)", "background-gradient-stop-positions": "data(stops)" } },
    { selector: "node[kind='group']", style: { "border-width": 1.5, "font-weight": 600 } },
    { selector: "node[kind='region']", style: { "border-width": 2 } },
    { selector: "node[kind='io']", style: { "corner-radius": 16, "border-style": "dashed" } },
    { selector: "node[kind='open']", style: { "background-color": theme("group"), "background-opacity": 0.55, "border-color": theme("groupline"), label: "", padding: 20, "corner-radius": 10 } },
    { selector: "node[kind='title']", style: { "background-color": theme("group"), "border-color": theme("groupline"), "font-weight": 600, color: theme("soft"), "z-compound-depth": "top",
      "corner-radius": 9 } },
    { selector: "node.on", style: { "border-color": theme("accent"), "border-width": 3 } },
    { selector: "edge", style: { width: 1.3, "line-color": theme("edge"), "target-arrow-color": theme("edge"), "target-arrow-shape": "triangle", "arrow-scale": 0.75,
      "curve-style": "straight" } },
    { selector: "edge[weights]", style: { "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(beside)", "segment-radii": 14,
      "edge-distances": "node-position" } },
    { selector: "edge[?far]", style: { display: "none", "curve-style": "bezier", "line-style": "dashed" } },
    { selector: "edge.on", style: { "line-color": theme("accent"), "target-arrow-color": theme("accent"), width: 2.2, display: "element", "z-index": 9 } },
  ];
}
function draw(anchor) {
  const held = anchor && cy.getElementById(anchor).length ? cy.getElementById(anchor).renderedPosition() : null;
  addedNow = new Set(stage().added.map((index) => data.nodes[index]));
  const { boxes, edges } = visible();
  largest = Math.max(0, ...[...boxes.values()].filter((b) => !b.open).map((b) => amount(b.nodes)));
  const graph = layout({ boxes, edges });
  const elements = [];
  for (const found of boxes.values()) {
    const colours = found.open ? {} : found.kind === "io" ? { fill: theme("io"), line: theme("io-line") } : paint(found.nodes, found.kind === "group");
    const { id, label, kind, width, height, value } = found;
    const { x, y } = graph.node(id);
    elements.push({ group: "nodes", position: { x, y }, data: { id, label, kind, width, height, value, parent: found.parent || undefined, ...colours } });
  }
  for (const edge of edges.values()) elements.push({ group: "edges", data: { ...edge, ...(edge.far ? {} : bends(graph, edge)) } });
  cy.batch(() => {
    cy.elements().remove();
    cy.style(styles());
    cy.add(elements);
  });
  // A module's name sits on its box, above the edges that cross it.
  for (const open of cy.nodes("[kind = 'open']").toArray()) {
    const corner = open.boundingBox({ includeLabels: false }), { width } = box(open.data("label"), 600);
    const position = { x: corner.x1 + 12 + width / 2, y: corner.y1 };
    cy.add({ data: { id: `title ${open.id()}`, label: open.data("label"), kind: "title", width: width - 6, height: 21, fill: theme("group"), line: theme("groupline") }, position });
  }
  if (held) {
    const now = cy.getElementById(anchor).length ? cy.getElementById(anchor).renderedPosition() : held;
    cy.panBy({ x: held.x - now.x, y: held.y - now.y });
  }
  mark();
}
function fit() {
  const whole = cy.elements().boundingBox();
  const zoom = Math.max(0.78, Math.min(1.1, (cy.width() - 60) / whole.w));
  const layer = cy.nodes("[kind = 'open']").filter((node) => /\.\d+$/.test(node.id())).first().descendants("[width]");
  const first = layer.sort((a, b) => a.position("y") - b.position("y")).first();
  const middle = whole.w * zoom < cy.width() || !first.length ? whole.x1 + whole.w / 2 : first.position("x");
  cy.viewport({ zoom, pan: { x: cy.width() / 2 - zoom * middle, y: 62 - zoom * whole.y1 } });
}
function mark() {
  cy.elements(".on").removeClass("on");
  const node = state.selected === null ? null : data.nodes[state.selected];
  const id = node ? node.path.find((path) => !state.open.has(path)) || node.id : null;
  if (id) cy.getElementById(id).addClass("on").connectedEdges().addClass("on");
}

// --- the panels

function tabs() {
  $("stages").innerHTML = stages.map((s, index) => {
    const changed = index ? [s.added.length && `+${s.added.length}`, s.removed.length && `−${s.removed.length}`].filter(Boolean).join(" ") : plural(s.nodes.length, "op");
    return `<button type="button" role="tab" aria-selected="${index === state.stage}" data-stage="${index}">${html(s.name)}<small>${changed}</small></button>`;
  }).join("");
  $("stages").children[state.stage].scrollIntoView({ inline: "nearest", block: "nearest" });
}
function legend() {
  if (mode() === "time" || mode() === "bytes") {
    const what = mode() === "time" ? `measured time, up to ${time(largest)}` : `memory traffic saved, up to ${size(largest)}`;
    $("legend").innerHTML = `<span><i class="ramp" style="background:linear-gradient(90deg,${ramp(0)},${ramp(1)})"></i>${what} in one box</span>`;
    return;
  }
  const kinds = mode() === "changes" ? ["added", "removed", "kept", "io"] : ["fused", "slower", "none", "near", "plain", "io"];
  const counts = {};
  for (const index of stage().nodes) counts[kindOf(data.nodes[index])] = (counts[kindOf(data.nodes[index])] || 0) + 1;
  $("legend").innerHTML = kinds.filter((kind) => kind === "io" || counts[kind]).map((kind) => {
    const name = COLOUR[kind] || kind;
    return `<span><i style="background:var(--${name});border-color:var(--${name}-line)"></i>${WORDS[kind]}${counts[kind] ? ` (${counts[kind]})` : ""}</span>`;
  }).join("");
}
function tree() {
  const query = state.query.toLowerCase();
  if (query) {
    const found = stage().nodes.map((index) => data.nodes[index]).filter((node) => [node.op, node.at, node.line, ...node.out, ...node.regions].join(" ").toLowerCase().includes(query));
    $("tree").innerHTML = `<p class="where">${plural(found.length, "match").replace("matchs", "matches")} in this stage</p>` + found.slice(0, 200).map((node) =>
      `<div class="row" data-node="${node.id.slice(1)}"><span class="name">${html(node.region || short(node.op))}<span class="at">${html(node.at || "top level")} · ${html(node.out[0] || "")}</span></span></div>`).join("");
    return;
  }
  const rows = [];
  const visit = (path, depth) => {
    const group = groups.get(path), open = state.open.has(path), caret = open ? "▾" : "▸";
    rows.push(`<div class="row" style="padding-left:${6 + 13 * depth}px" data-group="${html(path)}"><span class="caret">${caret}</span><span class="name" title="${html(path)}">${html(nameOf(path))}</span><span class="count">${group.all.length}</span></div>`);
    if (open) group.groups.forEach((inner) => visit(inner, depth + 1));
  };
  groups.get("").groups.forEach((path) => visit(path, 0));
  $("tree").innerHTML = rows.join("") || '<p class="where">This graph has no modules.</p>';
}
const tally = (indices) => Object.entries(indices.reduce((counts, index) => {
  const op = short(data.nodes[index].op);
  (counts[op] ??= []).push(index);
  return counts;
}, {})).sort((a, b) => b[1].length - a[1].length);
function overview() {
  const { name, added, removed, nodes } = stage();
  const list = (indices, sign, cls) => tally(indices).map(([op, all]) =>
    `<li><span class="num ${cls}">${sign}${all.length}</span> <span class="link" data-node="${all[0]}" ${sign === "−" ? `data-stage="${state.stage - 1}"` : ""}>${html(op)}</span></li>`).join("");
  const changed = state.stage === 0 ? "" : `<h3>What changed</h3>${added.length + removed.length ? `<ul>${list(added, "+", "plus")}${list(removed, "−", "minus")}</ul>` : "<p>nothing</p>"}`;
  const regions = data.regions_found.map((row) => `<li><span class="link" data-region="${html(row.name)}">${html(row.region)}</span> <span class="where">×${row.alike}</span>
    <span class="where" style="float:right">${row.used ? "✓" : "✗"} ${time(row.t_fallback)} → ${time(row.t_fused)}</span></li>`).join("");
  const misses = data.rules.filter((rule) => Object.keys(rule.refusals).length).map((rule) =>
    `<details><summary>${html(rule.rule)} <span class="where">${rule.matches} of ${rule.candidates}</span></summary><ul>${Object.entries(rule.refusals).map(([reason, count]) =>
      `<li><span class="num">${count} ×</span> ${html(reason)} <span class="where">${html(rule.places[reason])}</span></li>`).join("")}</ul></details>`).join("");
  const what = { recorded: "The forward pass, op by op, as it was recorded.", replay: "What a replay runs: kernels, and recorded ops where no kernel is used." }[name] || `The graph after the pass “${name}”.`;
  return `<h2>${html(name)}</h2><p class="where">${what} ${plural(nodes.length, "op")}.</p>${changed}
    ${regions ? `<h3>Regions</h3><ul>${regions}</ul>` : ""}${misses ? `<h3>Near misses</h3>${misses}` : ""}
    <h3>More</h3>${file("plan of a replay", data.plan)}${file("guards", data.guards.join("\n"))}`;
}
const file = (name, text) => (text ? `<details><summary>${html(name)}</summary><pre>${html(text)}</pre></details>` : "");
function values(title, names) {
  const rows = names.map((name) => {
    const [shape, bytes, stride, device] = data.values[name] || ["", null, [], ""];
    const kind = data.weights.includes(name) ? "weight" : data.inputs.includes(name) ? "argument" : "";
    return `<li><span class="mono">${html(name)}</span> ${kind ? `<span class="where">${kind}</span>` : ""}<br><span class="where">${html(shape)} · ${size(bytes)} · strides ${html(stride.join(", ") || "none")} · ${html(device)}</span></li>`;
  });
  return rows.length ? `<h3>${title}</h3><ul>${rows.join("")}</ul>` : "";
}
function details(node) {
  const region = regionOf(node), name = region && Object.keys(data.regions).find((key) => data.regions[key] === region);
  const kind = verdict(node), bytes = (names) => names.reduce((sum, value) => sum + (data.values[value] ? data.values[value][1] : 0), 0);
  let text = `<h2>${html(node.region || short(node.op))}</h2><p class="where">${html(node.at || "top level")}</p>
    <span class="chip" style="background:var(--${kind});border-color:var(--${kind}-line)">${WORDS[kind]}</span>`;
  text += `<h3>Op</h3><dl><dt>op</dt><dd class="mono">${html(node.op)}</dd>${node.attrs ? `<dt>attributes</dt><dd class="mono">${html(node.attrs)}</dd>` : ""}
    <dt>source</dt><dd class="mono">${html(node.line || "–")}</dd><dt>reads</dt><dd>${size(bytes(node.in))}</dd><dt>writes</dt><dd>${size(bytes(node.out))}</dd></dl>`;
  if (region) {
    const { decision, error } = region, slowest = Math.max(decision.t_fallback || 0, decision.t_fused || 0);
    const bar = (label, seconds, cls) => `<span>${label}</span><div class="bar ${cls}" style="width:${slowest ? (100 * (seconds || 0)) / slowest : 0}%"></div><span>${time(seconds)}</span>`;
    text += `<h3>Region ${html(name)}</h3><dl><dt>decision</dt><dd>${decision.use ? "used" : "not used"}: ${html(decision.reason)}${decision.cached ? " (measured earlier)" : ""}${decision.doubtful ? "; doubtful" : ""}</dd>
      <dt>where</dt><dd>${html(region.at || "top level")}</dd><dt>ops</dt><dd>${region.ops.length}: <span class="mono">${html(region.ops.map(short).join(", "))}</span></dd>
      <dt>memory</dt><dd>${size(region.bytes[0])} → ${size(region.bytes[1])}, saves ${size(region.bytes[0] - region.bytes[1])}</dd>
      ${error ? `<dt>error</dt><dd>${error.failed ? html(error.failed) : `${exact(error.error_fused)}, recorded ops ${exact(error.error_recorded)}`} ${error.ok ? "✓" : "✗ off"}</dd>` : ""}
      ${region.parts ? "<dt>parts</dt><dd>run instead of it</dd>" : ""}</dl>`;
    if (slowest) text += `<h3>Measured</h3><div class="times">${bar("recorded", decision.t_fallback, "grey")}${bar("fused", decision.t_fused, "")}</div>`;
  }
  const misses = [...new Set(node.of.flatMap((value) => nearMisses.get(value) || []))];
  if (misses.length) text += `<h3>Near misses</h3><ul>${misses.map(([rule, reason]) => `<li><b>${html(rule)}</b>: ${html(reason)}</li>`).join("")}</ul>`;
  const reasons = [...new Set(node.of.flatMap((value) => (data.ops[value] ? data.ops[value][2] : [])))];
  if (!region && reasons.length) text += `<h3>Why not fused</h3><ul>${reasons.map((reason) => `<li>${html(reason)}</li>`).join("")}</ul>`;
  if (region) text += `<h3>Code</h3>${Object.entries(region.files).map(([title, index]) => file(title, data.texts[index])).join("")}`;
  text += values("Inputs", node.in) + values("Outputs", node.out);
  if (node.of.length && (node.of.length > 1 || node.of[0] !== node.out[0])) text += `<h3>Made of the recorded values</h3><p class="mono">${html(node.of.join(", "))}</p>`;
  return text;
}
function panel() {
  $("right").innerHTML = state.selected === null ? overview() : details(data.nodes[state.selected]);
  $("right").scrollTop = 0;
}

// --- what a reader does

function show(anchor, whole) {
  if (whole) {
    collect();
    tabs();
    cy.resize();
  }
  $("mode").value = mode();
  draw(anchor);
  tree();
  legend();
}
function toggle(path) {
  if (!state.open.delete(path)) state.open.add(path);
  show(path);
}
function select(index, centre) {
  state.selected = index;
  if (index !== null && centre) {
    data.nodes[index].path.forEach((path) => state.open.add(path));
    show();
    cy.viewport({ zoom: Math.max(cy.zoom(), 0.8) });
    cy.center(cy.getElementById(data.nodes[index].id));
  }
  mark();
  panel();
}
function turn(index, selected = null) {
  state.stage = index;
  state.selected = null;
  show(null, true);
  fit();
  select(selected, selected !== null);
}
function find(region) { // where a region's op is in this stage, or in the latest that has it
  const order = [state.stage, ...stages.keys()].filter((index, i, all) => i === 0 || index !== all[0]).reverse();
  for (const index of [state.stage, ...order]) {
    const found = stages[index].nodes.find((n) => data.nodes[n].region === region) ?? stages[index].nodes.find((n) => data.nodes[n].regions.includes(region));
    if (found !== undefined) return [index, found];
  }
  return null;
}
cy.on("tap", "node", ({ target }) => {
  const id = target.id().replace(/^title /, "");
  if (groups.has(id)) toggle(id);
  else if (/^n\d+$/.test(id)) select(+id.slice(1));
});
cy.on("tap", (event) => event.target === cy && select(null));
document.addEventListener("click", ({ target }) => {
  const at = target.closest("[data-group],[data-node],[data-region],[data-stage]");
  if (!at) return;
  const { group, node, region, stage: to } = at.dataset;
  if (group) toggle(group);
  else if (region) {
    const found = find(region);
    if (found && found[0] !== state.stage) turn(...found);
    else if (found) select(found[1], true);
  } else if (node !== undefined && to !== undefined) turn(+to, +node);
  else if (node !== undefined) select(+node, true);
  else turn(+to);
});
$("search").addEventListener("input", ({ target }) => ((state.query = target.value.trim()), tree()));
$("mode").addEventListener("change", ({ target }) => ((state.mode = target.value), show()));
$("fit").addEventListener("click", () => cy.fit(undefined, 40));
$("less").addEventListener("click", () => (state.open.clear(), groups.get("").groups.length === 1 && state.open.add(groups.get("").groups[0]), show(), fit()));
$("theme").addEventListener("click", () => (document.documentElement.classList.toggle("dark"), show()));
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) (event.preventDefault(), $("search").focus());
  if (event.key === "Escape") (($("search").value = state.query = ""), $("search").blur(), tree(), select(null));
});

// --- the start

data.regions_found = [];
for (const [name, region] of Object.entries(data.regions)) {
  const { use, t_fallback, t_fused } = region.decision;
  const known = data.regions_found.find((row) => row.region === region.kind && row.used === use);
  if (known) Object.assign(known, { alike: known.alike + 1, t_fallback: known.t_fallback + t_fallback, t_fused: known.t_fused + t_fused });
  else data.regions_found.push({ name, region: region.kind, alike: 1, used: use, t_fallback, t_fused });
}
document.querySelector("h1").textContent = data.title;
const used = Object.values(data.regions).filter((region) => region.decision.use);
const whole = data.whole ? `  ·  measured whole: ${time(data.whole.t_fallback)} → ${time(data.whole.t_fused)}` : "";
$("summary").textContent = `${plural(stages[0].nodes.length, "recorded op")} → ${stages.at(-1).nodes.length.toLocaleString("en")} in a replay  ·  ${plural(used.length, "kernel")} used of ${plural(Object.keys(data.regions).length, "region")}  ·  ${size(used.reduce((sum, r) => sum + r.bytes[0] - r.bytes[1], 0))} of memory traffic saved${whole}`;
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.classList.add("dark");
collect();
openFirst();
turn(state.stage);
document.documentElement.dataset.ready = Math.round(performance.now());
