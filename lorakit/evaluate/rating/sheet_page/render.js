
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function textBox(text, label) {
  const box = make("div", {className: text ? "text" : "text empty", tabIndex: 0, dir: "auto"}, text || "(nothing)");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  return box;
}

function scale(answer, {name, asks, low, high}) {
  const given = state.given[current][answer];
  const choice = (value, className = "") => make("label", {className},
    make("input", {type: "radio", name: `${answer}-${name}`, value, checked: given.scores[name] === value}),
    make("span", {}, String(value)));
  const set = make("fieldset", {className: "scale"},
    make("legend", {}, `${name[0].toUpperCase()}${name.slice(1)} `,
      make("span", {className: "unseen"}, `of answer ${LETTERS[answer]}: `),
      make("span", {className: "asks"}, `${asks} 1 is ${low}, 5 ${high}.`)),
    make("div", {className: "choices"}, ...[1, 2, 3, 4, 5].map((number) => choice(number)), choice(UNSURE, "cannot")));
  set.addEventListener("change", ({target}) => {
    rate(answer, name, target.value === UNSURE ? UNSURE : Number(target.value));
  });
  Object.assign(set.dataset, {answer, criterion: name});
  return set;
}

function answerCard(text, answer) {
  const given = state.given[current][answer], letter = LETTERS[answer];
  const comment = make("textarea", {rows: 1, value: given.comment});
  comment.addEventListener("input", () => {
    Object.assign(given, {comment: comment.value, at: now()});
    changed();
  });
  const card = make("article", {className: "card answer"}, make("h3", {}, `Answer ${letter}`),
    textBox(text, `Answer ${letter}`), ...sheet.criteria.map((criterion) => scale(answer, criterion)),
    make("label", {className: "comment"}, "Comment ", make("span", {className: "unseen"}, `on answer ${letter} `),
      "(optional)", comment));
  return card;
}

function show(question, focus = true) {
  current = Math.max(0, Math.min(question, sheet.questions.length - 1));
  const {messages, reference, answers} = sheet.questions[current];
  const heading = make("h2", {tabIndex: -1}, `Question ${current + 1} of ${sheet.questions.length}`);
  const prompt = make("section", {className: "card prompt"}, heading, ...messages.map(({role, text}) =>
    make("div", {className: "message"}, ...(messages.length > 1 ? [make("div", {className: "role"}, role)] : []),
      textBox(text, `Question, ${role}`))));
  if (reference !== null) {
    prompt.append(make("details", {open: true}, make("summary", {}, "Reference answer"),
      textBox(reference, "Reference answer")));
  }
  byId("question").replaceChildren(prompt, make("div", {className: "answers"}, ...answers.map(answerCard)));
  byId("previous").disabled = current === 0;
  byId("next").disabled = current === sheet.questions.length - 1;
  showProgress();
  if (focus) {
    heading.focus({preventScroll: true});
    scrollTo(0, byId("question").offsetTop - 16);
  }
}

function showProgress() {
  const {open, all} = counts();
  Object.assign(byId("progress"), {max: all, value: all - open});
  byId("done").textContent = open ? `${all - open} of ${all} ratings` : "All rated: export your ratings";
  byId("overview").replaceChildren(...sheet.questions.map((_, question) => {
    const left = openOf(question), whole = left === 0, part = !whole && left < scalesOf(question);
    const button = make("button", {type: "button", className: whole ? "whole" : part ? "part" : ""}, `${question + 1}`);
    button.setAttribute("aria-label", `Question ${question + 1}, ${whole ? "rated" : `${left} open`}`);
    if (question === current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => show(question));
    return make("li", {}, button);
  }));
}

function say(text) {
  byId("status").textContent = text;
}
