// Every candidate's predicted quality as a bar, the cheapest first.

import { number } from "./words.js";

/** `models` are the candidates as /v1/models tells them; returns a function that shows a route, null for none. */
export function makeBars(list, scale, models, unit) {
  const sorted = [...models].sort((one, other) => one.candidate.cost - other.candidate.cost);
  const rows = new Map(sorted.map((model) => [model.id, makeRow(model, unit)]));
  list.replaceChildren(...[...rows.values()].map((row) => row.element));
  return (route) => {
    const predicted = route?.predicted_quality ?? {};
    const [start, end] = span(Object.values(predicted));
    for (const [name, row] of rows) showRow(row, predicted[name], start, end, name === route?.candidate);
    scale.textContent = start === null ? "" :
      `The qualities lie close together, so the bars begin at ${start.toFixed(3)}, a little under the lowest, not at 0.`;
  };
}

function makeRow({ id, candidate }, unit) {
  const element = document.createElement("li");
  const [name, track, value, price] = ["name", "track", "value", "cost"].map((kind) => {
    const part = document.createElement("span");
    part.className = kind;
    return part;
  });
  const fill = document.createElement("span");
  fill.className = "fill";
  track.append(fill);
  name.textContent = id;
  price.textContent = `${number(candidate.cost)} ${unit}`;
  element.append(name, track, value, price);
  element.dataset.candidate = id;
  const rescale = candidate.guidance_rescale > 0 ? `, rescaled by ${number(candidate.guidance_rescale)}` : "";
  const guidance = `guidance ${number(candidate.guidance_scale)}${rescale}`;
  element.title = `${candidate.steps} steps, ${candidate.sampler}, ${guidance}`;
  return { element, fill, value };
}

function showRow(row, quality, start, end, chosen) {
  const known = quality !== undefined;
  row.value.textContent = known ? quality.toFixed(3) : "";
  row.fill.style.width = known ? `${(100 * (quality - start)) / (end - start)}%` : "0";
  if (chosen) row.element.setAttribute("aria-current", "true");
  else row.element.removeAttribute("aria-current");
}

function span(values) {
  if (values.length === 0) return [null, null];
  const lowest = Math.min(...values);
  const highest = Math.max(...values);
  // Of equals, all bars are full.
  const under = highest > lowest ? (highest - lowest) / 6 : Math.abs(lowest) / 20 || 1;
  return [lowest - under, highest];
}
