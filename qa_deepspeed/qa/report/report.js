"use strict";
// The table of questions: search, filters, sorting, pages, and rows that open to their context. It reads the JSON of
// this file and nothing else; all text becomes text nodes, so that markup in the data stays text.
(() => {
  const PAGE_ROWS = 50;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const two = data.systems.length > 1;
  const collator = new Intl.Collator(undefined, { numeric: true });

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // Places count characters (code points) of the context; JavaScript's strings count UTF-16 units.
  const letters = data.contexts.map(() => null);
  function part(number, begin, end) {
    const context = data.contexts[number];
    if (!/[\ud800-\udfff]/.test(context)) return context.slice(begin, end);
    letters[number] = letters[number] || Array.from(context);
    return letters[number].slice(begin, end).join("");
  }
  const text = (span, context) => (typeof span === "string" ? span : part(context, span[0], span[0] + span[1]));

  const rows = data.rows.map(([id, question, context, golds, outcome, answers, slices, file, note], order) => {
    const row = { id, question, context, golds, outcome, slices, file, note, order };
    row.gold = golds.map((gold) => text(gold, context));
    row.answers = answers.map(([span, confidence, f1, nbest]) => {
      return { span, confidence, f1, nbest, text: text(span, context) };
    });
    row.sure = answers[answers.length - 1][1];
    row.change = two ? answers[1][2] - answers[0][2] : 0;
    row.searched = [id, question, ...row.gold, ...row.answers.map((one) => one.text)].join("\n").toLowerCase();
    return row;
  });
  const fileName = (row) => data.words[row.file].slice(1);
  const files = [...new Set(rows.map((row) => row.file))];
  const hasConfidence = rows.some((row) => row.sure !== null);

  const number = (value, digits) => (value === null ? "" : value.toFixed(digits));
  const asPercent = (value) => (value === null ? "" : `${(100 * value).toFixed(1)}%`);
  const shownText = (value) => (value === "" ? element("span", { class: "empty" }, "no answer") : value);
  const shownGold = (row) => shownText([...new Set(row.gold)].join(" | "));

  function changeCell(row) {
    const kind = row.change > 0 ? "good" : row.change < 0 ? "bad" : "";
    return element("span", { class: kind }, `${row.change > 0 ? "+" : ""}${number(100 * row.change, 0)}`);
  }

  // Each column: its title, the value that it is sorted by, what a cell shows, its classes, and its first direction.
  const systemColumns = data.systems.map((name, which) => ({
    title: two ? `Answer of ${name}` : "Answer", key: (row) => row.answers[which].text,
    cell: (row) => shownText(row.answers[which].text), kind: data.systems.length > 2 ? "system spare" : "system",
  }));
  const columns = [
    { title: "Question", key: (row) => row.question, cell: (row) => opener(row), kind: "question" },
    { title: "Gold answer", key: (row) => row.gold.join("|"), cell: shownGold, kind: "spare" },
    ...systemColumns,
    { title: "Outcome", key: (row) => row.outcome, cell: (row) => data.outcomes[row.outcome][1],
      kind: two ? "outcome spare" : "outcome" },
  ];
  if (hasConfidence && !two) {
    columns.push({ title: "Confi\u00addence", key: (row) => row.sure, cell: (row) => asPercent(row.sure),
      kind: "number narrow spare", down: true });
  }
  if (two) {
    columns.push({ title: "Change in F1", key: (row) => row.change, cell: changeCell, kind: "number narrow" });
  } else {
    columns.push({ title: "F1", key: (row) => row.answers[0].f1, cell: (row) => number(100 * row.answers[0].f1, 0),
      kind: "number narrow" });
  }
  if (files.length > 1) columns.push({ title: "File", key: fileName, cell: fileName, kind: "spare file" });

  const state = { page: 0, column: null, down: false, found: rows };

  function opener(row) {
    const button = element("button", { type: "button", class: "open", "aria-expanded": "false" }, row.question || row.id);
    button.addEventListener("click", () => toggle(row, button));
    return button;
  }

  function toggle(row, button) {
    const line = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    if (open) line.nextElementSibling.remove();
    else line.after(element("tr", { class: "detail", id: `detail-${row.order}` },
      element("td", { colspan: columns.length }, ...details(row))));
    button.setAttribute("aria-expanded", String(!open));
    if (open) button.removeAttribute("aria-controls");
    else button.setAttribute("aria-controls", `detail-${row.order}`);
  }

  function markedContext(row) {
    const places = [];
    const add = (span, kind) => {
      if (typeof span !== "string") places.push({ begin: span[0], end: span[0] + span[1], kind });
    };
    row.golds.forEach((gold) => add(gold, "gold"));
    row.answers.forEach((answer, which) => add(answer.span, which ? "second" : "first"));
    const length = Array.from(data.contexts[row.context]).length;
    const cuts = [...new Set([0, length, ...places.flatMap(({ begin, end }) => [begin, end])])].sort((a, b) => a - b);
    const shown = element("p", { class: "context" });
    for (let i = 0; i + 1 < cuts.length; i++) {
      const piece = part(row.context, cuts[i], cuts[i + 1]);
      const kinds = places.filter(({ begin, end }) => begin <= cuts[i] && cuts[i + 1] <= end).map(({ kind }) => kind);
      shown.append(kinds.length ? element("mark", { class: [...new Set(kinds)].join(" ") }, piece) : piece);
    }
    return shown;
  }

  function details(row) {
    const facts = element("dl");
    const fact = (name, kind, ...shown) => {
      facts.append(element("dt", {}, kind ? element("mark", { class: kind }, name) : name), element("dd", {}, ...shown));
    };
    fact("Gold", "gold", shownGold(row));
    row.answers.forEach((answer, which) => {
      const scores = ` (F1 ${number(100 * answer.f1, 0)}${answer.confidence === null ? "" : `, confidence ${asPercent(answer.confidence)}`})`;
      fact(two ? data.systems[which] : "Answer", which ? "second" : "first", shownText(answer.text), scores);
    });
    if (row.note) fact("Note", "", row.note);
    fact("Id", "", element("code", {}, row.id));
    const kinds = row.slices.map((one) => {
      const [name, ...value] = data.words[one].split("=");
      return `${data.slices[name] || name}: ${value.join("=")}`;
    });
    if (kinds.length) fact("Kind", "", kinds.join("; "));
    const lists = row.answers.map((answer, which) => nbestTable(row, answer, two ? ` of ${data.systems[which]}` : ""));
    return [markedContext(row), facts, ...lists.filter((list) => list !== null)];
  }

  function nbestTable(row, answer, whose) {
    if (!answer.nbest.length) return null;
    const body = element("tbody");
    for (const [span, probability] of answer.nbest) {
      body.append(element("tr", {}, element("td", { class: "number" }, asPercent(probability)),
        element("td", {}, shownText(text(span, row.context)))));
    }
    const head = element("tr", {}, element("th", { scope: "col", class: "number" }, "Probability"),
      element("th", { scope: "col" }, "Text"));
    return element("table", {}, element("caption", {}, `Best candidates${whose}`), element("thead", {}, head), body);
  }

  function matching() {
    const words = byId("search").value.toLowerCase().trim();
    const [outcome, slice, file] = ["outcome", "slice", "file"].map((id) => byId(id).value);
    const [least, most] = ["least", "most"].map((id) => (byId(id).value === "" ? null : Number(byId(id).value) / 100));
    return rows.filter((row) =>
      (!words || row.searched.includes(words)) &&
      (!outcome || data.outcomes[row.outcome][0] === outcome) &&
      (!slice || row.slices.includes(Number(slice))) &&
      (!file || row.file === Number(file)) &&
      (least === null || (row.sure !== null && row.sure >= least)) &&
      (most === null || (row.sure !== null && row.sure <= most)));
  }

  function compare(one, other, column, down) {
    const [a, b] = [column.key(one), column.key(other)];
    if (a === null || b === null) return (a === null) - (b === null) || one.order - other.order;
    const order = typeof a === "string" ? collator.compare(a, b) : a - b;
    return (down ? -order : order) || one.order - other.order;
  }

  function show() {
    const body = byId("table").tBodies[0];
    const first = state.page * PAGE_ROWS;
    const some = state.found.slice(first, first + PAGE_ROWS);
    body.replaceChildren(...some.map((row) => element("tr", {}, ...columns.map((column, place) =>
      element(place ? "td" : "th", { class: column.kind, ...(place ? {} : { scope: "row" }) }, column.cell(row))))));
    const count = (value) => value.toLocaleString("en");
    const range = some.length ? `${count(first + 1)} to ${count(first + some.length)} of ` : "";
    const left = rows.length === state.found.length ? "" : ` (${count(rows.length)} without filters)`;
    byId("status").textContent = `Questions ${range}${count(state.found.length)}${left}`;
    const pages = Math.max(Math.ceil(state.found.length / PAGE_ROWS), 1);
    byId("pages").hidden = pages === 1;
    byId("page").textContent = `Page ${state.page + 1} of ${pages}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
  }

  function refresh() {
    state.found = matching();
    if (state.column) state.found.sort((one, other) => compare(one, other, state.column, state.down));
    state.page = 0;
    show();
  }

  function sortBy(column, cell) {
    state.down = state.column === column ? !state.down : Boolean(column.down);
    state.column = column;
    cell.parentNode.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    refresh();
  }

  function turn(pages) {
    state.page += pages;
    show();
    byId("questions").scrollIntoView();
    byId("questions").focus({ preventScroll: true });
  }

  function fillFilters() {
    const option = (value, label) => element("option", { value }, label);
    data.outcomes.forEach(([key, name], place) => {
      const count = rows.filter((row) => row.outcome === place).length;
      if (count) byId("outcome").append(option(key, `${name} (${count})`));
    });
    const used = new Set(rows.flatMap((row) => row.slices));
    for (const [name, title] of Object.entries(data.slices)) {
      const values = [...used].filter((one) => data.words[one].startsWith(`${name}=`));
      if (values.length < 2) continue;
      const labels = values.map((one) => [one, data.words[one].slice(name.length + 1)]);
      labels.sort((a, b) => collator.compare(a[1], b[1]));
      byId("slice").append(element("optgroup", { label: title }, ...labels.map(([one, label]) => option(one, label))));
    }
    byId("slice").parentNode.hidden = used.size < 2;
    files.forEach((file) => byId("file").append(option(file, data.words[file].slice(1))));
    byId("file-filter").hidden = files.length < 2;
    byId("confidence-filter").hidden = !hasConfidence;
  }

  function start() {
    const head = element("tr");
    for (const column of columns) {
      const button = element("button", { type: "button" }, column.title);
      const cell = element("th", { scope: "col", class: column.kind }, button);
      button.addEventListener("click", () => sortBy(column, cell));
      head.append(cell);
    }
    byId("table").tHead.append(head);
    fillFilters();
    byId("filters").addEventListener("input", refresh);
    // A list that a program changes may send "change" alone; a text field sends it late, when a row is clicked already.
    document.querySelectorAll("#filters select").forEach((list) => list.addEventListener("change", refresh));
    byId("filters").addEventListener("reset", () => setTimeout(refresh));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    document.querySelectorAll("[data-outcome]").forEach((button) => {
      button.hidden = false;
      button.addEventListener("click", () => {
        byId("filters").reset();
        byId("outcome").value = button.dataset.outcome;
        refresh();
        turn(0);
      });
    });
    byId("filters").hidden = byId("table").hidden = false;
    // The first view: what is wrong, the surest first.
    const hardest = (row) => (two ? -Math.abs(row.change) : row.answers[0].f1);
    rows.sort((a, b) => hardest(a) - hardest(b) || (b.sure ?? 0) - (a.sure ?? 0) || a.order - b.order);
    refresh();
  }

  start();
})();
