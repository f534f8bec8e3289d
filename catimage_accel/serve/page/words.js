// Numbers and reasons, worded for people.

const WHYS = {
  tradeoff: (route) => `Routed, at a tradeoff of ${number(route.tradeoff)}.`,
  budget: () => "The best that keeps to the budget.",
  min_quality: () => "The cheapest that is predicted to be good enough.",
  candidate: () => "Chosen by hand.",
  load: (route) => `Many pictures wait, so it saves more than asked: tradeoff ${number(route.tradeoff)}.`,
  deadline: () => "A quicker one than the first choice, to be in time.",
  retry: () => "The first choice failed, so this one took over.",
};

export function number(value) {
  if (value === null || value === undefined) return "none";
  const digits = Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 };
  return value.toLocaleString("en", { ...digits, useGrouping: false });
}

export function cost(route) {
  return `${number(route.cost)} ${route.cost_unit}`;
}

/** E.g. "31 of 417 GFLOP, 93% saved". */
export function saved(route, dearest) {
  if (route.cost >= dearest) return `${cost(route)}, the dearest candidate`;
  const share = Math.floor(100 * (1 - route.cost / dearest));
  return `${number(route.cost)} of ${number(dearest)} ${route.cost_unit}, ${share}% saved`;
}

export function why(route) {
  return WHYS[route.reason]?.(route) ?? route.reason;
}

export function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 2 : 0)} s`;
}

export function times(route) {
  return `Waited ${seconds(route.queue_ms)}, drawn in ${seconds(route.draw_ms)}`;
}
