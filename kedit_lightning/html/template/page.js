"use strict";
(() => {
  const PAGE = 50;
  const { runs, metrics, columns: own, edits } = JSON.parse(document.getElementById("data").textContent);
  if (!edits.length) return;
  const at = (id) => document.getElementById(id);

  /* An element with its classes and what is in it; texts stay texts. */
  function make(tag, classes, ...inside) {
    const element = document.createElement(tag);
    if (classes) element.className = classes;
    element.append(...inside.filter((each) => each !== null && each !== undefined));
    return element;
  }

  function text(value) {
    if (value === null || value === undefined) return "–";
    return typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(value);
  }
  const asked = (edit) => (edit.prompt ?? "").replace("{}", () => edit.subject ?? "");

  /* What a column is called, what it sorts by, how it is shown. */
  const columns = [
    { name: "#", of: (edit) => edit.number, show: (edit) => text(edit.number + 1), look: "number" },
    ...(runs.length > 1 ? [{ name: "Run", of: (edit) => runs[edit.run], look: "text" }] : []),
    { name: "Case", of: (edit) => edit.id, look: "number" },
    { name: "Prompt", of: asked, show: prompt, look: "prompt" },
    { name: "New", of: (edit) => edit.target_new, look: "text" },
    { name: "Old", of: (edit) => edit.target_true, look: "text" },
    { name: "Before", of: (edit) => edit.answer_before, look: "answer" },
    { name: "After", of: (edit) => edit.answer_after, look: "answer" },
    { name: "Outcome", of: (edit) => edit.outcome, show: outcome, look: "text" },
    ...own.map(([i, name]) => ({
      name, long: metrics[i], of: (edit) => edit.after[i], look: "number", best: true,
    })),
    { name: "Commit", of: (edit) => edit.commit, look: "number" },
  ];

  function prompt(edit) {
    const [start, ...end] = text(edit.prompt).split("{}");
    return end.length ? [start, make("b", "", text(edit.subject)), end.join("{}")] : [start];
  }

  function outcome(edit) {
    return [make("span", `badge ${edit.outcome}`, edit.outcome), edit.why ? make("span", "why", edit.why) : null];
  }

  /* ------------------------------------------------------------ what is shown */

  const haystacks = edits.map((edit) =>
    [edit.id, asked(edit), edit.target_new, edit.target_true, edit.answer_before, edit.answer_after, edit.outcome, edit.why]
      .map((part) => part ?? "").join("\n").toLowerCase());
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  const state = { words: "", run: "", outcome: "", by: null, down: false, page: 0, open: new Set() };
  let found = edits.map((_, i) => i);

  function search() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    found = edits.map((_, i) => i).filter((i) =>
      (state.run === "" || edits[i].run === Number(state.run)) &&
      (state.outcome === "" || edits[i].outcome === state.outcome) &&
      words.every((word) => haystacks[i].includes(word)));
    if (state.by) {
      const values = new Map(found.map((i) => [i, state.by.of(edits[i])]));
      const sign = state.down ? -1 : 1;
      found.sort((i, j) => {
        const [one, other] = [values.get(i) ?? null, values.get(j) ?? null];
        if (one === null || other === null) return (one === null) - (other === null) || i - j;
        const order = typeof one === "number" && typeof other === "number" ? one - other : compare(one, other);
        return sign * order || i - j;
      });
    }
    state.page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const shown = found.slice(state.page * PAGE, (state.page + 1) * PAGE);
    at("list").tBodies[0].replaceChildren(...shown.flatMap((i) => (state.open.has(i) ? [row(i), more(i)] : [row(i)])));
    const begin = state.page * PAGE;
    const all = edits.length.toLocaleString("en");
    at("status").textContent = found.length
      ? `${found.length.toLocaleString("en")} of ${all} edits; here ${begin + 1} to ${begin + shown.length}`
      : `None of ${all} edits has all of these words`;
    at("place").textContent = `Page ${state.page + 1} of ${pages}`;
    at("earlier").disabled = state.page === 0;
    at("later").disabled = state.page === pages - 1;
    at("pages").hidden = pages === 1;
  }

  function row(i) {
    const edit = edits[i];
    const open = make("button", "open", state.open.has(i) ? "−" : "+");
    open.type = "button";
    open.setAttribute("aria-expanded", state.open.has(i));
    open.setAttribute("aria-label", `Metrics and losses of edit ${edit.number + 1}`);
    open.addEventListener("click", () => {
      state.open.has(i) ? state.open.delete(i) : state.open.add(i);
      draw();
      at("list").querySelector(`tr[data-edit="${i}"] .open`).focus();
    });
    const cells = columns.map((column) => {
      const shown = column.show ? column.show(edit) : text(column.of(edit));
      const cell = make("td", column.look, make("span", "", ...[shown].flat().filter((part) => part !== null)));
      cell.dataset.name = column.name;
      return cell;
    });
    const line = make("tr", "", make("td", "", open), ...cells);
    line.dataset.edit = i;
    return line;
  }

  /* ------------------------------------------------------------ under a row */

  function table(head, rows) {
    const top = make("tr", "", ...head.map((name, i) => make("th", i ? "number" : "", name)));
    const lines = rows.map((row) => make("tr", "", ...row.map((each, i) => make("td", i ? "number" : "", text(each)))));
    return make("table", "", make("thead", "", top), make("tbody", "", ...lines));
  }

  function more(i) {
    const edit = edits[i];
    const rows = metrics.map((metric, k) => [metric, edit.before[k], edit.after[k]]);
    ["probability of the new answer", "probability of the old answer"].forEach((name, k) =>
      rows.push([name, edit.likely[0][k], edit.likely[1][k]]));
    const known = rows.filter(([, ...values]) => values.some((value) => value !== null));
    const inside = make("div", "inside");
    if (known.length) inside.append(table(["Metric", "before", "after"], known));
    if (edit.stages.length) {
      const names = [...new Set(edit.stages.flatMap((stage) => Object.keys(stage)))];
      inside.append(table(["Stage", ...edit.stages.map((stage) => text(stage.stage))],
        names.filter((name) => name !== "stage").map((name) => [name, ...edit.stages.map((stage) => stage[name])])));
    }
    const when = typeof edit.time === "number" ? new Date(1000 * edit.time).toLocaleString() : edit.time;
    const spent = [when, edit.seconds === null ? null : `${edit.seconds} s`].filter(Boolean).join(", ");
    const cell = make("td", "", inside, spent ? make("p", "note", spent) : null);
    cell.colSpan = columns.length + 1;
    return make("tr", "more", cell);
  }

  /* ------------------------------------------------------------ controls */

  const heads = columns.map((column) => {
    const name = make(column.long ? "abbr" : "span", "", column.name);
    if (column.long) name.title = column.long;
    const button = make("button", "", name);
    button.type = "button";
    const head = make("th", column.look, button);
    head.scope = "col";
    button.addEventListener("click", () => sort(column, state.by === column ? !state.down : Boolean(column.best)));
    return head;
  });

  function sort(column, down) {
    [state.by, state.down] = [column, down];
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[columns.indexOf(column)].setAttribute("aria-sort", down ? "descending" : "ascending");
    at("by").value = 2 * columns.indexOf(column) + Number(down);
    search();
  }

  const corner = make("th", "", make("span", "hidden", "More"));
  corner.scope = "col";
  at("list").tHead.rows[0].append(corner, ...heads);

  runs.forEach((name, i) => at("run").append(new Option(name, i)));
  at("run").parentElement.hidden = runs.length === 1;
  [...new Set(edits.map((edit) => edit.outcome))].forEach((name) => at("outcome").append(new Option(name, name)));
  columns.forEach((column, i) =>
    at("by").append(new Option(`${column.name} ↑`, 2 * i), new Option(`${column.name} ↓`, 2 * i + 1)));
  at("by").addEventListener("input", () => sort(columns[at("by").value >> 1], at("by").value % 2 === 1));
  for (const name of ["words", "run", "outcome"]) {
    at(name).addEventListener("input", () => { state[name] = at(name).value; search(); });
  }
  at("find").addEventListener("submit", (event) => event.preventDefault());
  at("earlier").addEventListener("click", () => { state.page -= 1; draw(); });
  at("later").addEventListener("click", () => { state.page += 1; draw(); });

  /* On paper everything that is folded is open. */
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));

  draw();
})();
