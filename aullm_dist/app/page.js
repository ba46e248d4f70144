"use strict";
// Addresses are relative: the page's own ends with the token that every request needs.
const setup = JSON.parse(document.getElementById("setup").textContent);
const at = id => document.getElementById(id);
const PICTURE = /\.(jpe?g|png|bmp)$/i;
const STRIP = 12;
const MOST_FILES = 3000;
const STAGES = {
  evidence: "evidence", structure: "+ structure", deduction: "+ deduction", answer: "the answer",
};
let clip = null;
// A number per dropped clip: what is still under way for an earlier one is no longer shown.
let turn = 0;
let player = 0;

class Refusal extends Error {}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function tell(id, text) {
  at(id).textContent = text;
  at(id).hidden = !text;
}

async function ask(method, path, body) {
  let reply;
  try {
    reply = await fetch(path, { method, body });
  } catch {
    throw new Refusal("aullm-dist app does not answer. Is it still running? Its terminal says more.");
  }
  if (!reply.ok) throw new Refusal((await reply.text()).trim());
  return reply.json();
}

// Runs one piece of work and shows its refusal as a sentence.
async function attempt(work) {
  tell("error", "");
  at("predict").disabled = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal)) {
      tell("error", `The page has a fault: ${error.message}`);
      throw error;
    }
    tell("error", error.message);
  } finally {
    tell("status", "");
    at("predict").disabled = !clip;
  }
}

async function take(files, name) {
  const mine = ++turn;
  await attempt(async () => {
    clip = null;
    at("clip").hidden = at("result").hidden = true;
    play(false);
    // Of a folder the pictures alone; what else lies there is no part of the clip.
    const chosen = files.length > 1 ? files.filter(file => PICTURE.test(file.name)) : files;
    if (!files.length) throw new Refusal("Nothing was dropped that is a file.");
    if (!chosen.length) throw new Refusal(`None of the ${files.length} files is a frame; drop one video, or .jpg, .png or .bmp files.`);
    if (chosen.length > MOST_FILES) throw new Refusal(`${chosen.length} files; allowed: ${MOST_FILES}. Drop the frames of one clip.`);
    const bytes = chosen.reduce((sum, file) => sum + file.size, 0);
    const megabytes = value => (value / 1048576).toFixed(value < 10485760 ? 1 : 0);
    if (bytes > setup.max_bytes) throw new Refusal(`${megabytes(bytes)} MB; allowed: ${megabytes(setup.max_bytes)} MB in all, which --max-mb changes.`);
    const { id } = await ask("POST", "clips", JSON.stringify({ name }));
    for (const [index, file] of chosen.entries()) {
      if (mine !== turn) return;
      tell("status", chosen.length > 1 ? `Reading file ${index + 1} of ${chosen.length}` : `Reading ${file.name}`);
      await ask("PUT", `clips/${id}/files/${encodeURIComponent(file.name)}`, file);
    }
    tell("status", "Reading the frames");
    const read = await ask("POST", `clips/${id}/read`, "");
    if (mine !== turn) return;
    clip = { id, ...read };
    showClip(files.length - chosen.length);
    await predict(mine);
  });
}

const frame = place => `clips/${clip.id}/frames/${clip.numbers[place]}`;
const span = () => [Number(at("onset").value), Number(at("offset").value)];

function showClip(others) {
  const last = clip.numbers.length - 1;
  at("clip-title").textContent = `Clip: ${clip.name}`;
  const more = others ? `; ${others} other file${others > 1 ? "s" : ""} left out` : "";
  at("clip-facts").textContent = `${last + 1} frames, ${clip.numbers[0]} to ${clip.numbers[last]}, shown in gray${more}. Choose the span of one movement: by default the whole clip.`;
  for (const [id, value] of [["onset", 0], ["offset", last]]) {
    at(id).max = last;
    at(id).value = value;
  }
  at("strip").replaceChildren();
  const shown = Math.min(STRIP, last + 1);
  for (let index = 0; index < shown; index++) {
    const image = element("img");
    image.dataset.place = Math.round(index * last / Math.max(shown - 1, 1));
    image.alt = "";
    image.src = frame(image.dataset.place);
    image.addEventListener("click", () => moveNearest(Number(image.dataset.place)));
    at("strip").append(image);
  }
  notes(clip.notes);
  at("clip").hidden = false;
  showSpan();
}

function moveNearest(place) {
  const [onset, offset] = span();
  at(Math.abs(place - onset) <= Math.abs(place - offset) ? "onset" : "offset").value = place;
  showSpan();
}

function notes(lines) {
  at("notes").replaceChildren(...lines.map(line => element("li", line)));
  at("notes").hidden = !lines.length;
}

// Keeps onset before offset: the slider that is moved pushes the other.
function showSpan(moved) {
  const last = clip.numbers.length - 1;
  let [onset, offset] = span();
  if (onset >= offset && moved === "onset") offset = Math.min(onset + 1, last);
  if (onset >= offset) onset = Math.max(offset - 1, 0);
  if (onset >= offset) offset = onset + 1;
  for (const [id, place] of [["onset", onset], ["offset", offset]]) {
    at(id).value = place;
    at(id).setAttribute("aria-valuetext", `frame ${clip.numbers[place]}`);
    at(`${id}-number`).textContent = `frame ${clip.numbers[place]}`;
    at(`${id}-frame`).src = frame(place);
  }
  if (!player) showMovement(onset);
  for (const image of at("strip").children) {
    image.classList.toggle("within", onset <= image.dataset.place && image.dataset.place <= offset);
  }
  at("range").textContent = `frames ${clip.numbers[onset]} to ${clip.numbers[offset]}, both inclusive`;
  const answered = clip.answered && clip.answered.join() !== [onset, offset].join();
  tell("stale", answered ? "The span was changed since: Predict answers it again." : "");
}

function showMovement(place) {
  at("movement").src = frame(place);
  at("movement-number").textContent = `frame ${clip.numbers[place]}`;
}

function play(on) {
  clearInterval(player);
  player = 0;
  at("play").textContent = on ? "Stop" : "Play";
  at("play").setAttribute("aria-pressed", on);
  if (!on) return;
  let place = span()[0];
  player = setInterval(() => {
    const [onset, offset] = span();
    place = place < onset || place >= offset ? onset : place + 1;
    showMovement(place);
  }, 120);
}

async function predict(mine) {
  const [onset, offset] = span();
  tell("status", "The model answers");
  const body = JSON.stringify({ onset: clip.numbers[onset], offset: clip.numbers[offset] });
  const answer = await ask("POST", `clips/${clip.id}/answer`, body);
  if (mine !== turn) return;
  clip.answered = [onset, offset];
  notes([...new Set([...clip.notes, ...answer.notes])]);
  showAnswer(answer);
  showSpan();
}

function showAnswer(answer) {
  const active = answer.aus.filter(row => row.active).length;
  const [onset, other, last] = answer.frames;
  at("result-title").textContent = `${active} of ${answer.aus.length} action units active in frames ${onset} to ${last}`;
  at("save-json").href = `clips/${clip.id}/prediction.json`;
  at("save-png").href = `clips/${clip.id}/picture.png`;
  at("bars").tBodies[0].replaceChildren(...answer.aus.map(bar));
  showLadder(answer);
  at("face-onset").textContent = `Onset: frame ${onset}`;
  at("face-other").textContent = `${answer.other}: frame ${other}`;
  for (const name of ["onset", "other", "change", "evidence", "graph"]) {
    const image = at(`image-${name}`);
    image.closest("figure").hidden = !answer.images[name];
    if (answer.images[name]) image.src = answer.images[name];
  }
  at("policy").textContent = `Thresholds: ${answer.policy}.`;
  at("result").hidden = false;
}

function bar(row) {
  const line = element("tr", undefined, row.active ? "active" : "");
  const head = element("th", `AU${row.au} ${row.name}`);
  head.scope = "row";
  const track = element("span", undefined, "track");
  const fill = element("span", undefined, "fill");
  fill.style.width = `${100 * row.probability}%`;
  const mark = element("span", undefined, "mark");
  mark.style.left = `${100 * row.threshold}%`;
  track.append(fill, mark);
  track.title = `threshold ${row.threshold.toFixed(3)}`;
  const cell = element("td");
  cell.append(track);
  const unseen = element("span", `, ${row.active ? "active" : "not active"}, threshold ${row.threshold.toFixed(2)}`, "unseen");
  const number = element("td", row.probability.toFixed(2));
  number.append(unseen);
  line.append(head, cell, number);
  return line;
}

function showLadder(answer) {
  const one = answer.stages.length === 1;
  at("ladder-note").textContent = one
    ? "This model answers in one stage."
    : "The probability after each stage, which adds to the one before; the last is the answer. Bold: above the threshold.";
  at("ladder").parentElement.hidden = one;
  const head = element("tr");
  head.append(...["AU", ...answer.stages.map(name => STAGES[name]), "threshold"].map(text => element("th", text)));
  for (const cell of head.cells) cell.scope = "col";
  at("ladder").tHead.replaceChildren(head);
  at("ladder").tBodies[0].replaceChildren(...answer.aus.map(row => {
    const line = element("tr");
    const name = element("th", `AU${row.au}`);
    name.scope = "row";
    line.append(name);
    for (const value of row.ladder) {
      const cell = element("td", value.toFixed(3), value > row.threshold ? "above" : "");
      cell.style.backgroundColor = `rgb(0 114 178 / ${(0.3 * value).toFixed(3)})`;
      line.append(cell);
    }
    line.append(element("td", row.threshold.toFixed(3)));
    return line;
  }));
}

// A dropped folder comes as an entry whose files are asked for; browsers give them in portions.
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const portion = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!portion.length) return files;
    for (const inside of portion) if (inside.isFile) files.push(...await filesOf(inside));
  }
}

async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const plain = [...transfer.files];
  const folders = entries.filter(entry => entry.isDirectory);
  if (folders.length > 1) {
    turn++;
    tell("error", `${folders.length} folders; drop one, of the frames of one clip.`);
    return;
  }
  const files = folders.length ? await filesOf(folders[0]) : plain;
  await take(files, folders.length ? folders[0].name : nameOf(files));
}

const nameOf = files => files.length === 1 ? files[0].name : "frames";

addEventListener("dragover", event => {
  event.preventDefault();
  at("drop").classList.add("over");
});
addEventListener("dragleave", event => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
addEventListener("drop", event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  dropped(event.dataTransfer);
});
for (const id of ["files", "folder"]) {
  at(id).addEventListener("change", () => {
    // A copy: the list is emptied so that the same file can be chosen again.
    const files = [...at(id).files].filter(file => file.webkitRelativePath.split("/").length <= 2);
    const folder = files.length ? files[0].webkitRelativePath.split("/")[0] : "";
    at(id).value = "";
    if (files.length) take(files, folder || nameOf(files));
  });
}
for (const id of ["onset", "offset"]) at(id).addEventListener("input", () => showSpan(id));
at("play").addEventListener("click", () => play(!player));
at("predict").addEventListener("click", () => attempt(() => predict(turn)));
