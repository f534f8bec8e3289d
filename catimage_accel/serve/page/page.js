// The page: its form, the preview of the route, and the drawing.

import { ApiError, generate, getModels, getRoute, useToken } from "./api.js";
import { makeBars } from "./bars.js";
import { makeCard, makeHistory, pictureOf, showDone, showStopped } from "./cards.js";
import { number, saved, seconds } from "./words.js";

const PREVIEW_DELAY = 200;
const PARTIAL_IMAGES = 16;

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const addToHistory = makeHistory(at.history, view);
const page = {
  catalog: null, // of /v1/models
  dearest: 0,
  showBars: null,
  ownPosition: 0, // of the slider, at the catalog's own tradeoff
  drawing: null, // AbortController
  preview: null, // AbortController
  previewTimer: 0,
  tokenSent: false,
  afterToken: null, // what the missing token kept from being done
  viewed: null,
};

// --- models ---

async function load() {
  try {
    const [whole, ...models] = await getModels();
    hideError();
    showCatalog(whole, models);
    previewSoon(0);
  } catch (error) {
    fail(error, load);
  }
}

function showCatalog({ id, catalog }, models) {
  page.catalog = catalog;
  page.dearest = Math.max(...models.map((model) => model.candidate.cost));
  page.showBars = makeBars(at.bars, at.scale, models, catalog.cost_unit);
  at.catalog.textContent = `${id}, ${models.length} candidates`;
  at.candidate.replaceChildren(new Option("routed", ""), ...models.map(optionOf));
  at.candidate.options[0].disabled = !catalog.routed;
  if (!catalog.routed) at.candidate.selectedIndex = 1;
  page.ownPosition = Math.round(at.tradeoff.max * Math.sqrt(catalog.tradeoff / maxTradeoff() || 0));
  at.tradeoff.value = page.ownPosition;
  showTradeoff();
}

function optionOf({ id, candidate }) {
  const option = new Option(id, id);
  option.disabled = candidate.usable === false;
  return option;
}

// --- settings ---

function maxTradeoff() {
  return Math.max(page.catalog.max_tradeoff, page.catalog.tradeoff);
}

/** Quadratic, for small tradeoffs are the ones to choose between. */
function tradeoff() {
  const position = Number(at.tradeoff.value);
  if (position === page.ownPosition) return page.catalog.tradeoff;
  return Number((maxTradeoff() * (position / at.tradeoff.max) ** 2).toPrecision(3));
}

function showTradeoff() {
  const routed = page.catalog.routed && at.candidate.value === "";
  at.tradeoff.disabled = !routed;
  at["tradeoff-value"].textContent = routed ? number(tradeoff()) : "not used";
  at.tradeoff.setAttribute("aria-valuetext", number(tradeoff()));
}

/** What a route is asked for with. */
function routeBody() {
  const prompt = at.prompt.value;
  const candidate = at.candidate.value;
  if (candidate !== "") return { prompt, candidate };
  return { prompt, tradeoff: tradeoff() };
}

function drawBody() {
  const body = { ...routeBody(), n: Number(at.number.value), stream: true, progress: true, partial_images: PARTIAL_IMAGES };
  return at.seed.value === "" ? body : { ...body, seed: Number(at.seed.value) };
}

// --- the preview of the route ---

function previewSoon(delay = PREVIEW_DELAY) {
  clearTimeout(page.previewTimer);
  page.preview?.abort();
  page.previewTimer = setTimeout(preview, delay);
}

async function preview() {
  if (page.catalog === null) return;
  if (at.prompt.value.trim() === "") {
    showPreview(null, "Type a prompt to see.");
    return;
  }
  page.preview = new AbortController();
  const { signal } = page.preview;
  try {
    const route = await getRoute(routeBody(), signal);
    if (!signal.aborted) showPreview(route, previewText(route));
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) fail(error, preview);
    else showPreview(null, error.message);
  }
}

function showPreview(route, text) {
  page.showBars(route);
  at["route-preview"].textContent = text;
}

function previewText(route) {
  const best = Math.max(...Object.values(route.predicted_quality));
  const less = best - route.predicted_quality[route.candidate];
  const quality = !Number.isFinite(less) ? "" :
    less < 0.0005 ? " Predicted to be as good as any." : ` Predicted ${less.toFixed(3)} under the best.`;
  return `${route.candidate}: ${saved(route, page.dearest)}.${quality}`;
}

// --- drawing ---

async function draw() {
  if (page.catalog === null) await load();
  if (page.catalog === null || page.drawing !== null) return;
  hideError();
  page.drawing = new AbortController();
  const body = drawBody();
  const began = performance.now();
  const cards = Array.from({ length: body.n }, (_, index) => makeCard(`picture-${index}`, body.prompt, page.dearest));
  showDrawing(true, cards);
  let ended = "not drawn";
  try {
    await drawInto(cards, body, page.drawing.signal);
    at.status.textContent = `Done in ${seconds(performance.now() - began)}.`;
  } catch (error) {
    ended = page.drawing.signal.aborted ? "cancelled" : ended;
    at.status.textContent = ended === "cancelled" ? "Cancelled." : "";
    if (ended !== "cancelled") fail(error, draw);
  }
  for (const card of cards) if (!card.done) showStopped(card, ended);
  page.drawing = null;
  showDrawing(false);
}

async function drawInto(cards, body, signal) {
  at.status.textContent = "Asking the server.";
  for await (const event of generate(body, signal)) {
    const card = cards[event.image_index];
    if (card === undefined) continue;
    card.tell(event);
    if (event.type === "image_generation.queued") at.status.textContent = "Waiting for a place.";
    if (event.type === "image_generation.routed") at.status.textContent = `${event.route.candidate} draws.`;
    if (event.type === "image_generation.completed") finish(card, event);
  }
}

function finish(card, event) {
  const picture = pictureOf(event, card.prompt);
  showDone(card, picture);
  addToHistory(picture);
  at.earlier.hidden = false;
}

/** The one button takes the other's place, and its focus. */
function showDrawing(drawing, cards) {
  const [shown, gone] = drawing ? [at.cancel, at.draw] : [at.draw, at.cancel];
  const focused = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (focused) shown.focus();
  at.stage.setAttribute("aria-busy", String(drawing));
  if (drawing) {
    at.stage.replaceChildren(...cards.map((card) => card.element));
  }
}

// --- earlier pictures ---

function view(picture) {
  page.viewed = picture;
  const card = makeCard("viewed", picture.prompt, page.dearest);
  showDone(card, picture);
  at["viewer-prompt"].textContent = picture.prompt;
  at["viewer-card"].replaceChildren(card.element);
  at.viewer.showModal();
}

function drawAgain() {
  at.prompt.value = page.viewed.prompt;
  at.seed.value = page.viewed.seed;
  at.viewer.close();
  at.prompt.focus();
  previewSoon(0);
}

// --- errors and the token ---

function fail(error, again) {
  if (error.status === 401) {
    askForToken(again);
    return;
  }
  if (!(error instanceof ApiError)) console.error(error);
  at.error.textContent = error instanceof ApiError ? error.message : "Something went wrong on this page.";
  at.error.hidden = false;
}

function hideError() {
  at.error.hidden = true;
  at.error.textContent = "";
}

function askForToken(again) {
  page.afterToken = again;
  at["token-form"].hidden = false;
  at.token.focus();
  if (page.tokenSent) fail(new ApiError("The server did not accept the token."));
}

function sendToken() {
  useToken(at.token.value);
  page.tokenSent = true;
  at.token.value = "";
  at["token-form"].hidden = true;
  hideError();
  at.prompt.focus();
  page.afterToken();
}

// --- wiring ---

function onSubmit(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

onSubmit(at["draw-form"], draw);
onSubmit(at["token-form"], sendToken);
at.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at["draw-form"].requestSubmit();
});
at.prompt.addEventListener("input", () => previewSoon());
for (const input of [at.tradeoff, at.candidate]) {
  input.addEventListener("input", () => {
    showTradeoff();
    previewSoon();
  });
}
at.cancel.addEventListener("click", () => page.drawing?.abort());
at["viewer-again"].addEventListener("click", drawAgain);
at["viewer-close"].addEventListener("click", () => at.viewer.close());
at.stage.replaceChildren(makeCard("picture-0", "", 0).element);
load();
