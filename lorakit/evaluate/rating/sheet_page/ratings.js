
"use strict";
// Every text of the sheet is set as text, never as markup: answers are whatever a model wrote.
const sheet = JSON.parse(document.getElementById("data").textContent);
const KIND = "lorakit-ratings", VERSION = 1, UNSURE = "cannot judge";
const PLACE = `lorakit-sheet-${sheet.id}`;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const byId = (id) => document.getElementById(id);

let state = fresh();
let current = 0;

function fresh() {
  const token = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0"));
  return {
    rater: "", token: token.join(""), started: now(), exported: null, changed: false,
    given: sheet.questions.map((question) => question.answers.map(() => ({scores: {}, comment: "", at: null}))),
  };
}

function now() {
  return new Date().toISOString();
}

// ---- what is kept and exported: one shape for both

function asFile() {
  const ratings = [];
  state.given.forEach((answers, question) => answers.forEach((given, answer) => {
    if (given.at) ratings.push({question: sheet.questions[question].id, answer: LETTERS[answer], ...given});
  }));
  const {rater, token, started, exported} = state;
  return {kind: KIND, version: VERSION, sheet: sheet.id, name: sheet.name, rater, token, started, exported, ratings};
}

function fromFile(file) {
  if (file?.kind !== KIND) throw new Error("it holds no exported ratings");
  if (file.version !== VERSION) throw new Error("it was exported by another version of this page");
  if (file.sheet !== sheet.id) throw new Error("its ratings are of another sheet");
  const read = fresh();
  const numbers = new Map(sheet.questions.map((question, number) => [question.id, number]));
  for (const {question, answer, scores, comment, at} of file.ratings) {
    const place = read.given[numbers.get(question)]?.[LETTERS.indexOf(answer)];
    const right = sheet.criteria.every(({name}) => [undefined, 1, 2, 3, 4, 5, UNSURE].includes(scores[name]));
    if (!place || !right) throw new Error("it is damaged");
    Object.assign(place, {scores: {...scores}, comment: String(comment), at});
  }
  const {rater, token, started, exported} = file;
  return {...read, rater: String(rater), token: String(token), started, exported, changed: Boolean(file.changed)};
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify({...asFile(), changed: state.changed}));
    byId("unkept").hidden = true;
  } catch {  // switched off, forbidden for files, or full
    byId("unkept").hidden = false;
  }
}

function recall() {
  try {
    const kept = localStorage.getItem(PLACE);
    if (kept) state = fromFile(JSON.parse(kept));
  } catch (error) {
    say(`What this browser kept could not be read: ${reasonOf(error)}.`);
  }
}

function reasonOf(error) {  // our own are plain Errors; others come of a file that is not as it was exported
  return error.constructor === Error ? error.message : "it is damaged";
}

function changed() {
  state.changed = true;
  keep();
}

// ---- counting

function openOf(question) {
  return state.given[question].flatMap((given) => sheet.criteria.filter(({name}) => !(name in given.scores))).length;
}

function scalesOf(question) {
  return sheet.questions[question].answers.length * sheet.criteria.length;
}

function counts() {
  const numbers = sheet.questions.map((_, question) => question);
  const open = numbers.reduce((sum, question) => sum + openOf(question), 0);
  return {open, all: numbers.reduce((sum, question) => sum + scalesOf(question), 0)};
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}
