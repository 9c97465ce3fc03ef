
function rate(answer, criterion, value) {
  const given = state.given[current][answer];
  if (value === null) delete given.scores[criterion];
  else given.scores[criterion] = value;
  given.at = now();
  changed();
  showProgress();
}

const scales = () => [...document.querySelectorAll(".scale")];

function focusScale(set) {
  const after = byId(byId("next").disabled ? "export" : "next");
  (set?.querySelector("input:checked") ?? set?.querySelector("input") ?? after).focus();
}

function firstOpen() {
  return scales().find((set) => !set.querySelector("input:checked"));
}

function rateByKey(set, key) {
  const value = key === "0" ? UNSURE : key;
  const input = [...set.querySelectorAll("input")].find((one) => one.value === value);
  input.checked = true;
  input.dispatchEvent(new Event("change", {bubbles: true}));
  focusScale(scales()[scales().indexOf(set) + 1]);
}

function takeBack(set) {
  for (const input of set.querySelectorAll("input")) input.checked = false;
  rate(Number(set.dataset.answer), set.dataset.criterion, null);
}

document.addEventListener("keydown", (event) => {
  const {key, target} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (target.matches("textarea, input[type=text]")) return;
  const set = target.closest(".scale");
  const beside = (step) => focusScale(scales()[scales().indexOf(set) + step] ?? set);
  const acts = {
    n: () => show(current + 1), p: () => show(current - 1),
    ArrowRight: set ? null : () => show(current + 1), ArrowLeft: set ? null : () => show(current - 1),
    ArrowDown: set ? () => beside(1) : null, ArrowUp: set ? () => beside(-1) : null,
    Backspace: set ? () => takeBack(set) : null,
  };
  const rated = /^[0-5]$/.test(key) ? set ?? firstOpen() : null;
  const act = rated ? () => rateByKey(rated, key) : Object.hasOwn(acts, key) ? acts[key] : null;
  if (!act) return;
  event.preventDefault();
  act();
});

// ---- files

function exportRatings() {
  if (!state.rater.trim()) {
    say("Write your name or an alias first: it tells your ratings from those of others.");
    byId("rater").focus();
    return;
  }
  Object.assign(state, {exported: now(), changed: false});
  const name = `ratings-${state.rater.trim().replace(/[^\p{L}\p{M}\p{N}._-]+/gu, "-")}.json`;
  const blob = new Blob([JSON.stringify(asFile(), null, 2), "\n"], {type: "application/json"});
  const link = make("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  keep();
  const {open} = counts();
  say(`Exported as ${name}. ` + (open ? `${plural(open, "rating")} still open.` : "Nothing is open."));
}

async function importRatings(file) {
  if (!file || (state.changed && !confirm("Replace the ratings on this page, which are not exported?"))) return;
  try {
    state = fromFile(JSON.parse(await file.text()));
  } catch (error) {
    say(`${file.name} was not imported: ${reasonOf(error)}.`);
    return;
  }
  keep();
  begin();
  say(`Imported ${file.name}: ${plural(counts().open, "rating")} still open.`);
}

function begin() {
  byId("rater").value = state.rater;
  const open = sheet.questions.findIndex((_, question) => openOf(question));
  show(open < 0 ? 0 : open, false);
}

byId("previous").addEventListener("click", () => show(current - 1));
byId("next").addEventListener("click", () => show(current + 1));
byId("export").addEventListener("click", exportRatings);
byId("import").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", ({target}) => {
  importRatings(target.files[0]).finally(() => { target.value = ""; });
});
byId("again").addEventListener("click", () => {
  if (!confirm("Forget all ratings on this page, to begin anew or let another person rate?")) return;
  state = fresh();
  keep();
  begin();
  say("Nothing is rated.");
});
byId("rater").addEventListener("input", ({target}) => {
  state.rater = target.value;
  changed();
});
addEventListener("beforeunload", (event) => {
  if (state.changed) event.preventDefault();
});
addEventListener("storage", ({key}) => {  // the same sheet in another tab
  if (key !== PLACE) return;
  recall();
  byId("rater").value = state.rater;
  show(current, false);
});

recall();
keep();
begin();
