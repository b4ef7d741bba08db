"use strict";

const at = (id) => document.getElementById(id);
let face = null; // the chosen face, a Blob
let key = sessionStorage.getItem("aroface-key") || "";
let stream = null; // of the camera, while it is on
let asked = 0; // number of the newest search; the answers of older ones belong to a face that is gone
let isEnrolling = false;

async function call(method, path, fields) {
  const started = performance.now();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const body = fields && new FormData();
  for (const [name, value] of Object.entries(fields || {})) body.append(name, value, ...(value instanceof Blob ? ["face.png"] : []));
  const answer = await fetch(path, { method, headers, body }).catch(() => null);
  if (!answer) throw new Error("The service does not answer: it is down, out of reach, or refused so large a file.");
  if (answer.status === 401) lock(true, key && "This is not the key of the service.");
  const content = await answer.json().catch(() => null);
  if (!answer.ok || !content) throw new Error(content?.error || `Status ${answer.status}, and no word why.`);
  if (method !== "GET") at("last").textContent = `${Math.round(performance.now() - started)} ms`;
  return content;
}

function lock(isLocked, why = "") {
  at("key-form").hidden = !isLocked;
  at("main").hidden = at("load").hidden = isLocked;
  at("key-message").textContent = why;
  if (!isLocked) return;
  at("gallery").textContent = "locked";
  at("key").focus();
}

function say(text, isBad = false) {
  at("message").textContent = text;
  at("message").classList.toggle("bad", isBad);
}

async function attempt(action) {
  say("");
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  }
}

function choose(blob) {
  stopCamera();
  face = blob;
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(blob);
  at("preview").hidden = false;
  at("hint").hidden = true;
  at("search").disabled = at("enrol-button").disabled = false;
  say("");
  clearMatches("Nothing searched yet.");
}

function clearMatches(why) {
  asked += 1;
  at("matches").replaceChildren();
  at("nothing").hidden = false;
  at("nothing").textContent = why;
}

async function search() {
  const mine = (asked += 1);
  const { matches, is_calibrated: isCalibrated } = await call("POST", "v1/search", { image: face, top: "5" });
  if (mine !== asked) return;
  clearMatches("Nobody found.");
  at("nothing").hidden = matches.length > 0;
  at("matches").replaceChildren(...matches.map((match) => line(match, isCalibrated)));
  at("matches").firstElementChild?.scrollIntoView({ block: "nearest" }); // below the face on a narrow screen
}

function line(match, isCalibrated) {
  const item = document.createElement("li");
  item.classList.toggle("match", match.fpir !== null);
  const cell = (tag, name, text) => {
    const element = document.createElement(tag);
    element.className = name;
    element.textContent = text;
    item.append(element);
    return element;
  };
  cell("span", "rank", match.rank);
  cell("span", "subject", match.subject_id);
  cell("span", "score", match.score.toFixed(3));
  const remove = cell("button", "remove", "Delete");
  remove.title = remove.ariaLabel = `delete the entry ${match.entry_id}`;
  remove.addEventListener("click", () => attempt(async () => {
    if (!confirm(`Delete the entry ${match.entry_id} of ${match.subject_id}?`)) return;
    await call("DELETE", `v1/entries?entry_id=${encodeURIComponent(match.entry_id)}`);
    clearMatches("Search again.");
    say(`Deleted ${match.entry_id}.`);
    if ((await refreshGallery()).entries && face) await search();
  }));
  const bar = document.createElement("i");
  bar.style.width = `${100 * Math.max(0, Math.min(1, match.score))}%`;
  cell("span", "bar", "").append(bar);
  if (isCalibrated) cell("span", "meaning", match.meaning);
  return item;
}

async function enrol(event) {
  event.preventDefault();
  if (isEnrolling) return; // a double click enrols once
  isEnrolling = true;
  try {
    const entry = await call("POST", "v1/entries", { image: face, subject_id: at("subject").value.trim() });
    say(`Enrolled ${entry.subject_id} as the entry ${entry.entry_id}.`);
  } finally {
    isEnrolling = false;
  }
  await refreshGallery();
}

async function refreshGallery() {
  const gallery = await call("GET", "v1/gallery");
  lock(false);
  const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
  const subjects = gallery.subjects === null ? "" : ` of ${count(gallery.subjects, "subject", "subjects")}`;
  const size = gallery.entries ? count(gallery.entries, "entry", "entries") + subjects : "Empty: choose a face and enrol it";
  at("gallery").textContent = `${size} · ${gallery.model} · index ${gallery.index}`;
  const wanted = gallery.detects_faces ? "a photograph of one person, or an aligned face crop," : "an aligned, square face crop";
  if (!face) at("hint").textContent = `Drop ${wanted} here, or choose a file`;
  const found = gallery.thresholds.map(({ fpir, score, level, doubts }) =>
    `${score.toFixed(3)} at ${+(100 * fpir).toPrecision(6)} % false alarms${level === "pooled" ? ", pooled" : ""}${doubts.length ? ` (uncertain: ${doubts.join("; ")})` : ""}`);
  at("thresholds").textContent = found.length ? `Thresholds: ${found.join(", ")}` : "Not calibrated: scores have no meaning by themselves (aroface gallery calibrate).";
  return gallery;
}

async function refreshStatus() {
  const status = await call("GET", "v1/status");
  at("waiting").textContent = Object.values(status.waiting).reduce((sum, count) => sum + count, 0);
  at("rate").textContent = status.requests_per_s.toFixed(1);
  at("median").textContent = status.median_ms === null ? "–" : `${status.median_ms.toFixed(0)} ms`;
  at("p99").textContent = status.p99_ms === null ? "–" : `${status.p99_ms.toFixed(0)} ms`;
}

async function camera() {
  if (stream) {
    choose(await photograph());
    return;
  }
  if (!navigator.mediaDevices) throw new Error("The browser gives the camera to https:// and localhost pages only.");
  stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  at("video").srcObject = stream;
  await at("video").play();
  showCamera(true);
  at("preview").hidden = at("hint").hidden = true;
  face = null; // the one chosen before is hidden now: nobody shall search or enrol it unseen
  at("search").disabled = at("enrol-button").disabled = true;
  clearMatches("Nothing searched yet.");
  at("camera").textContent = "Take it";
  say("Bring eyes, nose and mouth corners to the dots, then take it.");
}

function showCamera(isShown) {
  at("video").hidden = !isShown;
  at("guide").toggleAttribute("hidden", !isShown); // SVG elements have no property of that name
}

function photograph() {
  // The square that the page shows: the middle of the picture. Not mirrored, unlike the preview.
  const video = at("video");
  const side = Math.min(video.videoWidth, video.videoHeight);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.min(side, 448);
  const left = (video.videoWidth - side) / 2;
  const top = (video.videoHeight - side) / 2;
  canvas.getContext("2d").drawImage(video, left, top, side, side, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function stopCamera() {
  if (!stream) return;
  stream.getTracks().forEach((track) => track.stop());
  stream = null;
  showCamera(false);
  at("camera").textContent = "Camera";
}

at("file").addEventListener("change", () => {
  if (at("file").files.length) choose(at("file").files[0]);
  at("file").value = ""; // the same file may be chosen again
});
at("preview").addEventListener("error", () => {
  at("preview").hidden = true;
  at("hint").hidden = false;
  at("hint").textContent = "This file is no picture that can be shown.";
});
for (const [name, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", isOver);
    if (name === "drop" && event.dataTransfer.files.length) {
      choose(event.dataTransfer.files[0]);
      attempt(search);
    }
  });
}
at("drop").addEventListener("click", (event) => stream && event.preventDefault());
at("search").addEventListener("click", () => attempt(search));
at("enrol").addEventListener("submit", (event) => attempt(() => enrol(event)));
at("camera").addEventListener("click", () => attempt(camera));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!/^[\x20-\x7e]+$/.test(at("key").value)) return lock(true, "A key has no letters with accents, nor signs of other scripts.");
  key = at("key").value.trim();
  sessionStorage.setItem("aroface-key", key);
  attempt(refreshGallery);
});

attempt(refreshGallery);
setInterval(() => {
  if (!at("key-form").hidden) return;
  refreshStatus().catch(() => ["waiting", "rate", "median", "p99"].forEach((name) => { at(name).textContent = "–"; }));
}, 2000);
