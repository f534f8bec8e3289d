// A picture, from its place in the queue to its download, and the strip of those drawn before.

import { saved, times, why } from "./words.js";

const HISTORY_SIZE = 24;

/** An empty frame; `card.tell(event)` shows what a drawing's event says. */
export function makeCard(id, prompt, dearest) {
  const template = document.getElementById("card-template");
  const element = template.content.firstElementChild.cloneNode(true);
  element.id = id;
  const card = { element, prompt, dearest, done: false, part: (name) => element.querySelector(`.${name}`) };
  card.tell = (event) => TELLING[event.type]?.(card, event);
  return card;
}

const TELLING = {
  "image_generation.queued": (card, { queue_depth: depth }) => {
    card.part("steps").textContent = depth > 1 ? `${depth} pictures wait` : "waiting";
  },
  "image_generation.routed": (card, { route }) => {
    showRoute(card, route);
    card.part("steps").textContent = "beginning";
  },
  "image_generation.progress": (card, { step, steps }) => {
    Object.assign(card.part("progress").querySelector("progress"), { max: steps, value: step });
    card.part("steps").textContent = `step ${step} of ${steps}`;
  },
  "image_generation.partial_image": (card, { b64_json: data, output_format: format }) => {
    showPicture(card, `data:image/${format};base64,${data}`);
  },
};

/** Shows a finished picture: {url, prompt, seed, route, format}. */
export function showDone(card, picture) {
  card.done = true;
  card.element.classList.add("done");
  showRoute(card, picture.route);
  showPicture(card, picture.url);
  card.part("picture").alt = picture.prompt;
  card.part("times").textContent = times(picture.route);
  card.part("seed").textContent = `seed ${picture.seed}`;
  Object.assign(card.part("download"), { href: picture.url, download: fileName(picture) });
}

/** Says why there is no picture. */
export function showStopped(card, text) {
  card.element.classList.add("stopped");
  card.part("steps").textContent = text;
}

function showRoute(card, route) {
  card.part("candidate").textContent = route.candidate;
  card.part("why").textContent = why(route);
  card.part("saved").textContent = saved(route, card.dearest);
}

function showPicture(card, url) {
  const image = card.part("picture");
  image.src = url;
  image.hidden = false;
}

function fileName({ route, seed, format }) {
  return `catimage-${route.candidate}-${seed}.${format === "jpeg" ? "jpg" : format}`;
}

/** A file's blob URL, out of an event of a finished picture. */
export function pictureOf({ b64_json: data, output_format: format, seed, route }, prompt) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: `image/${format}` }));
  return { url, prompt, seed, route, format };
}

/** The strip, newest first; `open(picture)` is called for a chosen one. Returns the function that adds one. */
export function makeHistory(list, open) {
  const pictures = [];
  return (picture) => {
    pictures.unshift(picture);
    list.prepend(makeThumb(picture, open));
    for (const dropped of pictures.splice(HISTORY_SIZE)) {
      list.lastElementChild.remove();
      URL.revokeObjectURL(dropped.url);
    }
  };
}

function makeThumb(picture, open) {
  const image = document.createElement("img");
  Object.assign(image, { src: picture.url, alt: picture.prompt, width: 64, height: 64 });
  const button = document.createElement("button");
  Object.assign(button, { type: "button", title: `${picture.prompt}\n${picture.route.candidate}` });
  button.append(image);
  button.addEventListener("click", () => open(picture));
  const item = document.createElement("li");
  item.append(button);
  return item;
}
