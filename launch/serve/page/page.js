"use strict";

const at = (id) => document.getElementById(id);
let face = null; // the chosen face, a Blob
let key = sessionStorage.getItem("aroface-key") || "";
let stream = null; // of the camera, while it is on

async function call(method, path, fields) {
  const started = performance.now();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const body = fields && new FormData();
  for (const [name, value] of Object.entries(fields || {})) body.append(name, value, ...(value instanceof Blob ? ["face.png"] : []));
  const answer = await fetch(path, { method, headers, body });
  if (answer.status === 401) at("key-form").hidden = false;
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  if (method !== "GET") at("last").textContent = `${Math.round(performance.now() - started)} ms`;
  return content;
}

function say(text, isBad = false) {
  at("message").textContent = text;
  at("message").classList.toggle("bad", isBad);
}

async function attempt(action) {
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
}

async function search() {
  const { matches, is_calibrated: isCalibrated } = await call("POST", "v1/search", { image: face, top: "5" });
  at("nothing").hidden = matches.length > 0;
  at("nothing").textContent = "Nobody found.";
  at("matches").replaceChildren(...matches.map((match) => line(match, isCalibrated)));
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
  remove.title = `delete the entry ${match.entry_id}`;
  remove.addEventListener("click", () => attempt(async () => {
    if (!confirm(`Delete the entry ${match.entry_id} of ${match.subject_id}?`)) return;
    await call("DELETE", `v1/entries?entry_id=${encodeURIComponent(match.entry_id)}`);
    say(`Deleted ${match.entry_id}.`);
    await refreshGallery();
    await search();
  }));
  const bar = document.createElement("i");
  bar.style.width = `${100 * Math.max(0, Math.min(1, match.score))}%`;
  cell("span", "bar", "").append(bar);
  if (isCalibrated) cell("span", "meaning", match.meaning);
  return item;
}

async function enrol(event) {
  event.preventDefault();
  const subject = at("subject").value.trim();
  const entry = await call("POST", "v1/entries", { image: face, subject_id: subject });
  say(`Enrolled ${entry.subject_id} as ${entry.entry_id}; length of the embedding ${entry.norm.toFixed(2)}.`);
  await refreshGallery();
}

async function refreshGallery() {
  const gallery = await call("GET", "v1/gallery");
  at("key-form").hidden = true;
  const subjects = gallery.subjects === null ? "" : ` of ${gallery.subjects} subjects`;
  at("gallery").textContent = `${gallery.entries} entries${subjects} · ${gallery.model} · index ${gallery.index}`;
  const found = gallery.thresholds.map(({ fpir, score, level, doubts }) =>
    `${score.toFixed(3)} at ${+(100 * fpir).toPrecision(6)} % false alarms${level === "pooled" ? ", pooled" : ""}${doubts.length ? ` (uncertain: ${doubts.join("; ")})` : ""}`);
  at("thresholds").textContent = found.length ? `Thresholds: ${found.join(", ")}` : "Not calibrated: scores have no meaning by themselves (aroface gallery calibrate).";
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

at("file").addEventListener("change", () => at("file").files.length && choose(at("file").files[0]));
at("drop").addEventListener("keydown", (event) => event.key === "Enter" && at("file").click());
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
  key = at("key").value;
  sessionStorage.setItem("aroface-key", key);
  attempt(refreshGallery);
});

attempt(refreshGallery);
setInterval(() => refreshStatus().catch(() => {}), 2000);
