"use strict";
// The page of one result or several. Texts only ever become text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const MODES = [["accept", "Accept probability"], ["rank", "Rank"], ["verdict", "Verdict"]];
const THEMES = [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]];
const RANKS = ["0", "1", "2", "3–4", "5–9", "10+"];
const ACCEPTS = ["< 25%", "25–50%", "50–75%", "75–95%", "≥ 95%"];
const UNSEEN = new RegExp(data.unseen, "gu");
const state = { result: 0, mode: "accept" };

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null));
  return made;
}

const mark = (text) => element("span", { class: "mark" }, text);

function unseen(character, breaks) {
  const code = character.codePointAt(0);
  if (character === "\n") return breaks ? [mark("↵"), "\n"] : [mark("↵")];
  if (character === "\t") return breaks ? [mark("⇥"), "\t"] : [mark("⇥")];
  if (code < 32) return [mark(String.fromCodePoint(0x2400 + code))];
  return [mark("⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩")];
}

/** A text as nodes in which nothing is invisible. */
function visible(text, breaks = true) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(UNSEEN)) {
    nodes.push(text.slice(last, match.index), ...unseen(match[0], breaks));
    last = match.index + match[0].length;
  }
  nodes.push(text.slice(last));
  return nodes.filter((node) => node !== "");
}

/** A token by itself: the spaces at its ends count. */
function named(text, id) {
  if (text === null) return [mark("#" + id)];
  if (text === "") return [element("span", { class: "none" }, "part of a character")];
  const [, before, middle, after] = /^( *)([^]*?)( *)$/.exec(text);
  const spaces = (some) => (some ? [mark("␣".repeat(some.length))] : []);
  return [...spaces(before), ...visible(middle, false), ...spaces(after)];
}

function percent(value) {
  if (value === null) return "–";
  if (value > 0 && value < 0.0005) return "< 0.1%";
  if (value < 1 && value >= 0.9995) return "> 99.9%";
  return (100 * value).toFixed(1) + "%";
}

const acceptStep = (value) => [0.25, 0.5, 0.75, 0.95].filter((limit) => value >= limit).length;
const rankStep = (rank) => [1, 2, 3, 5, 10].filter((limit) => rank >= limit).length;
const isAsked = (token) => token.verdict === "accepted" || token.verdict === "fallback";
const isWithoutAgent = (result) => result.tokens.length > 0 && result.tokens.every((token) => token.verdict === "plain");

function classes(token) {
  const found = ["token"];
  if (isAsked(token)) found.push("accept-" + acceptStep(token.accept_prob));
  if (isAsked(token)) found.push("rank-" + rankStep(token.rank));
  else found.push(token.verdict);
  if (token.verdict === "fallback") found.push("rejected");
  else if (token.rank) found.push("changed", "later");
  else if (token.verdict === "accepted") found.push("first");
  if (token.is_special) found.push("special");
  return found.join(" ");
}

function segments(choices, chosen, label, choose) {
  const group = element("div", { class: "segments", role: "radiogroup", "aria-label": label });
  fillSegments(group, choices, chosen, choose);
  return group;
}

function fillSegments(group, choices, chosen, choose) {
  const buttons = choices.map(([value, text], index) => {
    const pick = (place) => {
      const [picked] = choices[place];
      buttons.forEach((button, other) => {
        button.setAttribute("aria-checked", String(other === place));
        button.tabIndex = other === place ? 0 : -1;
      });
      choose(picked);
    };
    const button = element("button", { type: "button", role: "radio", "data-value": value, onclick: () => pick(index) }, text);
    button.setAttribute("aria-checked", String(value === chosen));
    button.tabIndex = value === chosen ? 0 : -1;
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const place = (index + step + choices.length) % choices.length;
      pick(place);
      buttons[place].focus();
    });
    return button;
  });
  group.replaceChildren(...buttons);
}

function legend() {
  const entry = (look, text) => element("li", {}, element("span", { class: "swatch " + look }), text);
  const steps = {
    accept: ACCEPTS.map((text, step) => entry("accept-" + step, text)).reverse(),
    rank: RANKS.map((text, step) => entry("rank-" + step, "rank " + text)),
    verdict: [entry("first", "rank 0 accepted"), entry("later", "later rank accepted"), entry("rejected", "all rejected: fallback")],
  }[state.mode];
  const others = [entry("forced", "single candidate, not asked")];
  if (state.mode !== "verdict") others.push(entry("changed", "not the LM's first"), entry("rejected", "all rejected"));
  return [...steps, ...others];
}

function promptNodes(prompt) {
  if (typeof prompt === "string") return [element("p", { class: "prompt", dir: "auto" }, visible(prompt))];
  if (prompt.every((item) => typeof item === "number")) return [element("p", { class: "prompt" }, "token ids " + prompt.join(", "))];
  const content = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return prompt.map((message) => element("p", { class: "prompt", dir: "auto" },
    element("span", { class: "role" }, visible(content(message.role)), ": "), visible(content(message.content))));
}

function promptLine(prompt) {
  if (typeof prompt === "string") return visible(prompt.slice(0, 120), false);
  if (prompt.every((item) => typeof item === "number")) return ["token ids " + prompt.slice(0, 20).join(", ")];
  return visible(String(prompt[prompt.length - 1].content).slice(0, 120), false);
}

function figures(pairs) {
  return element("dl", { class: "figures" }, pairs.map(([name, value]) => [element("dt", {}, visible(name)), element("dd", {}, visible(String(value)))]));
}

function statistics(result) {
  const stats = result.stats;
  const share = (count) => (stats.num_tokens ? ` (${Math.round((100 * count) / stats.num_tokens)}%)` : "");
  const ofAgent = [
    ["Decided by the agent", stats.num_decided + share(stats.num_decided)],
    ["Forced: single candidate", stats.num_forced + share(stats.num_forced)],
    ["All rejected", stats.num_all_rejected + share(stats.num_all_rejected)],
    ["Candidates asked about", stats.num_examined],
  ];
  const isPlain = isWithoutAgent(result);
  const pairs = [
    ["Tokens", stats.num_tokens],
    ...(isPlain ? [] : ofAgent),
    ["LM forwards per token", stats.num_tokens ? (stats.num_forwards / stats.num_tokens).toFixed(2) : "–"],
    ["Ended by", result.finish_reason],
  ];
  const rows = Object.entries(stats.accepted_ranks).map(([rank, count]) => ["rank " + rank, count, "rank-" + rankStep(Number(rank))]);
  if (stats.num_all_rejected) rows.push(["all rejected", stats.num_all_rejected, "rejected"]);
  const most = Math.max(1, ...rows.map(([, count]) => count));
  const bars = rows.map(([label, count, look]) => {
    const column = element("span", { class: "column " + (look === "rejected" ? "all-rejected" : look) });
    column.style.width = (100 * count) / most + "%";
    column.style.background = look === "rejected" ? "var(--fallback)" : "var(--accent)";
    return [element("span", { class: "label" }, label), column, element("span", { class: "number" }, String(count))];
  });
  const none = result.error ? "No position was decided before the error." : "It was never asked.";
  return element("section", { class: "card columns", "aria-label": "Statistics" },
    element("div", {}, element("h2", {}, "Statistics"), figures(pairs)),
    isPlain ? null : element("div", {}, element("h2", {}, "Ranks taken where the agent was asked"),
      rows.length ? element("div", { class: "histogram" }, bars) : element("p", { class: "none" }, none)));
}
