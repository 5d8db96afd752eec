// The review page. What the server says is only ever put into the page as text, never as HTML.
"use strict";

const token = location.pathname.split("/")[1];
const main = document.getElementById("main");
const zoom = document.getElementById("zoom");
const message = document.getElementById("message");

let state = { version: "" }; // counts, as the server told them last
let waiting = false; // a decision is under way
let shown = 0; // counts the views, so that a late answer does not overwrite a newer view
const chosen = new Map(); // what is selected in the present view: id or number -> its data

// small helpers

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const number = (value) => value.toLocaleString("en");
const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
const percent = (value) => `${Math.round(100 * value)} %`;

function thumbnail(photo, attributes = {}) {
  return element("img", { src: `thumbnail/${photo.id}`, alt: photo.name, title: photo.name, loading: "lazy", ...attributes });
}

function zoomable(photo) {
  return thumbnail(photo, { onclick: () => enlarge(photo) });
}

function enlarge(photo) {
  zoom.querySelector("img").src = `photo/${photo.id}`;
  zoom.querySelector("p").textContent = photo.name;
  zoom.showModal();
}

zoom.addEventListener("click", () => zoom.close());
zoom.addEventListener("close", () => zoom.querySelector("img").removeAttribute("src"));

// talking to the server

async function ask(address, fields) {
  const options = fields && {
    method: "POST",
    headers: { "X-Token": token, "Content-Type": "application/json" },
    body: JSON.stringify(fields),
  };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw { error: "The server does not answer. Start it again with `fastreid-uns review`, and open the address that it prints." };
  }
  const isJson = (response.headers.get("Content-Type") || "").includes("json");
  const content = isJson ? await response.json() : { error: await response.text() };
  if (!response.ok) throw content;
  if (content.state) take(content.state);
  return content;
}

function take(next) {
  const changed = state.version !== "" && state.version !== next.version;
  state = next;
  document.title = `${state.name} · Review`;
  document.getElementById("name").textContent = state.name;
  document.getElementById("left").textContent = number(state.left);
  document.getElementById("group-count").textContent = number(state.groups);
  document.getElementById("answer-count").textContent = number(state.answered + state.changes);
  document.getElementById("facts").textContent = `${count(state.photos, "photo")} · ${number(state.alone)} alone`;
  document.getElementById("undo").disabled = state.undo === null;
  return changed;
}

let hiding = 0;

function say(text, button = null, seconds = 5) {
  clearTimeout(hiding);
  message.replaceChildren(element("span", {}, text), ...(button ? [button] : []));
  message.hidden = false;
  hiding = setTimeout(() => { message.hidden = true; }, 1000 * seconds);
}

function complain(problem) {
  if (!problem.error) throw problem;
  const takeBack = problem.row && element("button", { onclick: () => decide("api/undo", { row: problem.row }, "The earlier answer was taken back. Decide again.") }, "Take the earlier one back");
  say(problem.error, takeBack || null, takeBack ? 30 : 10);
}

async function decide(address, fields, done) {
  if (waiting) return;
  waiting = true;
  main.ariaBusy = "true";
  try {
    const content = await ask(address, fields);
    if (done) say(typeof done === "function" ? done(content) : done);
  } catch (problem) {
    complain(problem);
  }
  await show(); // until then a quick key would answer the old question
  waiting = false;
}

function undo() {
  if (state.undo !== null) decide("api/undo", { row: state.undo }, (content) => `Taken back: ${told(content.done)}.`);
}

function told(decision) {
  if (decision.kind === "pair") return `the answer “${decision.answer}”`;
  return decision.kind === "merge" ? "a merge" : "a split";
}

// view: questions

async function showQuestions(mine) {
  const { questions } = await ask("api/questions?count=3");
  if (mine !== shown) return;
  if (!questions.length) return main.replaceChildren(noQuestions());
  const [question, ...later] = questions;
  for (const side of later.flatMap((one) => [one.first, one.second])) new Image().src = `photo/${side.id}`;
  const answer = (word) => () => decide("api/answer", { first: question.first.id, second: question.second.id, answer: word });
  const choice = (word, label, key) =>
    element("button", { class: word, "data-answer": word, onclick: answer(word) }, `${label} `, element("kbd", {}, key));
  main.replaceChildren(
    element("p", { class: "ask" }, "Is this the same individual?"),
    element("p", { class: "context" }, question.together
      ? `Both are in group ${question.first.group} now.`
      : `They are in groups ${question.first.group} and ${question.second.group} now.`),
    element("div", { class: "pair" }, side(question.first), side(question.second)),
    element("div", { class: "choices" }, choice("same", "Same", "S"), choice("unsure", "Unsure", "U"), choice("different", "Different", "D")),
  );
}

function side(photo) {
  return element("section", { class: "side", "data-photo": photo.name },
    element("button", { class: "large", title: "Enlarge", onclick: () => enlarge(photo) },
      element("img", { src: `photo/${photo.id}`, alt: photo.name })),
    element("div", { class: "about" },
      element("span", { class: "file", title: photo.name }, photo.name),
      element("a", { href: `#group/${photo.group}` }, `Group ${photo.group}`),
      element("span", { class: "quiet" }, `, ${count(photo.size, "photo")}`),
      element("div", { class: "strip" }, ...photo.others.map(zoomable))));
}

function noQuestions() {
  return element("div", { class: "empty" },
    element("h2", {}, "No question is left."),
    element("p", {}, `${count(state.answered, "answer")} and ${count(state.changes, "change")} of groups are noted. This command groups the photos again and obeys them:`),
    element("code", {}, state.resume),
    element("p", { class: "quiet" }, "You can go on with the list of groups: the most doubtful come first."));
}

// view: list of groups

async function showGroups(mine, parameters) {
  const order = parameters.get("order") || "doubt";
  const least = parameters.get("least") || "1";
  const page = await ask(`api/groups?page=${parameters.get("page") || 1}&order=${order}&least=${least}`);
  if (mine !== shown) return;
  const go = (changes) => { location.hash = `groups?${new URLSearchParams({ order, least, page: 1, ...changes })}`; };
  const choose = (name, value, options) => element("select", { name, onchange: (event) => go({ [name]: event.target.value }) },
    ...options.map(([key, label]) => element("option", { value: key, selected: key === value }, label)));
  const merge = element("button", { class: "main", id: "merge", disabled: true, onclick: () => mergeGroups(...chosen.values()) }, "Merge two groups");
  const cards = page.groups.map((group) => card(group, merge));
  main.replaceChildren(
    element("div", { class: "bar" },
      element("label", {}, "Sort by ", choose("order", order, [["doubt", "doubt"], ["size", "size"], ["number", "number"]])),
      element("label", {}, "Show ", choose("least", least, [["1", "all groups"], ["2", "two photos and more"]])),
      element("span", { class: "quiet" }, count(page.count, "group")),
      element("span", { class: "push quiet" }, "Tick two groups that are one individual"), merge),
    element("div", { class: "groups" }, ...cards),
    element("div", { class: "pages" },
      element("button", { disabled: page.page <= 1, onclick: () => go({ page: page.page - 1 }) }, "Previous"),
      element("span", {}, `Page ${number(page.page)} of ${number(page.pages)}`),
      element("button", { disabled: page.page >= page.pages, onclick: () => go({ page: page.page + 1 }) }, "Next")));
}

function card(group, merge) {
  const box = element("a", { class: "card", href: `#group/${group.number}`, "data-group": group.number },
    element("span", { class: "head" }, element("b", {}, `Group ${group.number}`), element("span", { class: "quiet" }, count(group.size, "photo"))),
    doubt(group),
    element("span", { class: "mosaic" }, ...group.photos.map((photo) => thumbnail(photo))));
  if (!merge) return box;
  const pick = element("input", { type: "checkbox", class: "pick", "aria-label": `Choose group ${group.number}`,
    onchange: (event) => {
      event.target.checked ? chosen.set(group.number, group) : chosen.delete(group.number);
      box.classList.toggle("chosen", event.target.checked);
      merge.disabled = chosen.size !== 2;
    } });
  return element("div", { class: "holder" }, box, pick);
}

function doubt(group) {
  if (group.size === 1) return element("span", { class: "doubt" }, "alone");
  return element("span", { class: "doubt" }, element("meter", { min: 0, max: 1, value: group.doubt, title: "Doubt about its least certain photo" }), `doubt ${percent(group.doubt)}`);
}

function mergeGroups(first, second) {
  const fields = { first: first.number, first_mark: first.mark, second: second.number, second_mark: second.mark };
  return decide("api/merge", fields, (content) => {
    if (location.hash.startsWith("#group/")) location.hash = `group/${content.done}`;
    return `Groups ${first.number} and ${second.number} are one now: group ${content.done}.`;
  });
}

// view: one group

async function showGroup(mine, name) {
  let group;
  try {
    group = await ask(`api/groups/${encodeURIComponent(name)}`);
  } catch (problem) {
    if (mine !== shown) return;
    main.replaceChildren(element("div", { class: "empty" },
      element("h2", {}, `There is no group ${name} any more.`),
      element("p", {}, "It was merged with another one, or split, or the photos were grouped again."),
      element("a", { href: "#groups" }, "All groups")));
    return;
  }
  if (mine !== shown) return;
  const split = (together) => () => decide("api/split",
    { number: group.number, mark: group.mark, photos: [...chosen.keys()], together },
    ({ done }) => `Split off from group ${group.number} as group${done.length > 1 ? "s" : ""} ${done.join(", ")}.`);
  const buttons = [
    element("button", { class: "main", id: "split", disabled: true, onclick: split(true) }, "Split off together"),
    element("button", { id: "split-each", disabled: true, onclick: split(false) }, "Split off one by one")];
  const hint = element("span", { class: "quiet" });
  const update = () => {
    const some = chosen.size > 0 && chosen.size < group.size;
    buttons[0].disabled = !some;
    buttons[0].textContent = chosen.size > 1 ? "Split off as one new group" : "Split off";
    buttons[1].hidden = chosen.size < 2;
    buttons[1].disabled = !some;
    hint.textContent = chosen.size === group.size ? "At least one photo must stay." : chosen.size
      ? `${count(chosen.size, "photo")} selected` : "Select photos that are another individual.";
  };
  main.replaceChildren(
    element("div", { class: "bar" },
      element("a", { href: "#groups" }, "All groups"),
      element("h2", {}, `Group ${group.number}`),
      element("span", { class: "quiet" }, count(group.size, "photo")), doubt(group),
      mergeField(group)),
    element("div", { class: "members" }, ...group.photos.map((photo) => member(photo, update))),
    group.nearest.length ? nearest(group) : "",
    element("div", { class: "tools" }, ...buttons, hint));
  update();
}

function mergeField(group) {
  const field = element("input", { type: "number", min: 1, required: true, "aria-label": "Number of the other group" });
  const submit = async (event) => {
    event.preventDefault();
    try {
      const other = await ask(`api/groups/${Number(field.value)}`);
      await mergeGroups(group, other);
    } catch (problem) { complain(problem); }
  };
  return element("form", { class: "push", onsubmit: submit }, "Merge with group ", field, " ", element("button", {}, "Merge"));
}

function member(photo, update) {
  const figure = element("figure", { class: "member", "data-photo": photo.name },
    element("button", { class: "pickable", "aria-pressed": "false", title: "Select",
      onclick: (event) => {
        const on = !chosen.has(photo.id);
        on ? chosen.set(photo.id, photo) : chosen.delete(photo.id);
        figure.classList.toggle("chosen", on);
        event.currentTarget.setAttribute("aria-pressed", on);
        update();
      } }, thumbnail(photo)),
    element("figcaption", {},
      element("span", { class: "file", title: photo.name }, photo.name.split("/").pop()),
      element("span", { class: "quiet", title: "Confidence that it belongs here" }, percent(photo.confidence)),
      element("button", { title: "Enlarge", "aria-label": `Enlarge ${photo.name}`, onclick: () => enlarge(photo) }, "+")));
  return figure;
}

function nearest(group) {
  const cards = group.nearest.map((other) => {
    const box = card(other, null);
    return element("div", { class: "holder" }, box,
      element("button", { class: "merge-near", "data-merge": other.number, onclick: () => mergeGroups(group, other) }, `Same individual: merge ${group.number} and ${other.number}`));
  });
  return element("section", { class: "near" }, element("h2", {}, "Nearest groups"), element("div", { class: "groups" }, ...cards));
}

// view: answers

async function showAnswers(mine) {
  const { answers } = await ask("api/answers");
  if (mine !== shown) return;
  if (!answers.length) {
    return main.replaceChildren(element("div", { class: "empty" }, element("h2", {}, "Nothing is decided yet."), element("a", { href: "#questions" }, "Go to the questions")));
  }
  main.replaceChildren(element("ol", { class: "answers" }, ...answers.map(answerRow)));
}

function answerRow(decision) {
  const words = { pair: decision.answer, merge: "merged with", split: decision.answer === "apart" ? "split one by one from" : "split from" };
  const photos = (part) => element("span", { class: "photos" }, ...part.photos.slice(0, 4).map(zoomable),
    part.count > 4 ? element("span", { class: "quiet" }, `+${number(part.count - 4)}`) : null);
  return element("li", { "data-row": decision.row },
    photos(decision.first), element("span", { class: `what ${decision.answer}` }, words[decision.kind]), photos(decision.second),
    element("time", { datetime: decision.time }, new Date(decision.time).toLocaleString()),
    element("button", { onclick: () => decide("api/undo", { row: decision.row }, `Taken back: ${told(decision)}.`) }, "Take back"));
}

// which view

async function show() {
  const mine = ++shown;
  main.ariaBusy = "true";
  const [path, query] = location.hash.slice(1).split("?");
  const [view, name] = (path || "questions").split("/");
  chosen.clear();
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.dataset.view === view || (view === "group" && link.dataset.view === "groups");
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  try {
    if (view === "groups") await showGroups(mine, new URLSearchParams(query));
    else if (view === "group") await showGroup(mine, name);
    else if (view === "answers") await showAnswers(mine);
    else await showQuestions(mine);
  } catch (problem) { complain(problem); }
  if (mine === shown) main.ariaBusy = "false";
}

async function look() { // has another window decided something?
  if (document.hidden || waiting || !zoom.matches(":not([open])")) return;
  try {
    const next = await ask("api/state");
    if (!take(next)) return;
    if (chosen.size) return say("Another window has changed something. Your selection is kept; it is checked when you decide.");
    say("Updated: another window has changed something.");
    await show();
  } catch (problem) { complain(problem); }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || zoom.open || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const answer = { s: "same", d: "different", u: "unsure" }[event.key.toLowerCase()];
  if (event.key.toLowerCase() === "z") undo();
  else if (answer) main.querySelector(`[data-answer=${answer}]`)?.click();
});
document.getElementById("undo").addEventListener("click", undo);
window.addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
document.addEventListener("visibilitychange", look);
setInterval(look, 3000);
show();
