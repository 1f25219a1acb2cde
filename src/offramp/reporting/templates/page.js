"use strict";
(() => {
  const tip = document.getElementById("tip");
  // Titles of marks become one box of the page: a browser would show both.
  for (const title of document.querySelectorAll("figure svg title")) {
    title.parentNode.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  const line = (name, text) => {
    const row = document.createElement("tr");
    for (const each of [name, text]) row.appendChild(document.createElement("td")).textContent = each;
    return row;
  };
  const fill = (heading, row) => {
    const head = document.createElement("b");
    head.textContent = heading;
    tip.replaceChildren(head);
    if (!row) return;
    const table = document.createElement("table");
    const heads = row.closest("table").tHead.rows[0].cells;
    [...row.cells].forEach((cell, index) => {
      const text = [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean).join(" ");
      if (text !== "–") table.appendChild(line(heads[index].textContent.trim(), text));
    });
    for (const fact of (row.dataset.facts || "").split("; ").filter(Boolean)) {
      const space = fact.indexOf(" ");
      table.appendChild(line(fact.slice(0, space), fact.slice(space + 1)));
    }
    tip.appendChild(table);
  };
  const place = (event) => {
    const box = tip.getBoundingClientRect(), gap = 14;
    const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
    const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };
  addEventListener("pointerover", (event) => {
    const mark = event.target.closest("figure svg [aria-label]");
    const name = event.target.closest("tr[data-facts] > th");
    if (!mark && !name) {
      tip.hidden = true;
      return;
    }
    const link = mark && mark.closest("a");
    const row = name ? name.parentNode : link && document.getElementById(link.getAttribute("href").slice(1));
    fill(mark ? mark.getAttribute("aria-label") : name.textContent.trim(), row);
    tip.hidden = false;
    place(event);
  });
  addEventListener("pointermove", (event) => tip.hidden || place(event));
  addEventListener("click", (event) => {  // a finger has no other way to see the record of a mark
    if (event.pointerType === "touch" && event.target.closest("figure svg a")) event.preventDefault();
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  const value = (row, index) => {
    const cell = row.cells[index], number = parseFloat(cell.dataset.value);
    return Number.isNaN(number) ? cell.textContent.trim() : number;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  const sort = (head) => {
    const body = head.closest("table").tBodies[0], index = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const each of head.parentNode.cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => sign * compare(value(a, index), value(b, index))));
  };
  for (const head of document.querySelectorAll("thead th")) {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort(head));
  }
})();
