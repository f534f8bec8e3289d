// The server's HTTP API.

import { readEvents } from "./sse.js";

let token = null;

/** What the server, or the way to it, says is wrong, in words to show. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Kept in memory only. */
export function useToken(value) {
  token = value;
}

export async function getModels() {
  const answer = await call("/v1/models");
  return (await answer.json()).data;
}

export async function getRoute(body, signal) {
  const answer = await call("/v1/routes", body, signal);
  return answer.json();
}

/** Yields the events of a drawing; throws what it ends early with. */
export async function* generate(body, signal) {
  const answer = await call("/v1/images/generations", body, signal);
  for await (const { data } of readEvents(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.type === "error") throw new ApiError(event.error.message);
    yield event;
  }
  throw new ApiError("The connection ended before the drawing did.");
}

async function call(path, body, signal) {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const answer = await reach(path, options);
  if (!answer.ok) throw new ApiError(await messageOf(answer), answer.status);
  return answer;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached.");
  }
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status} ${answer.statusText}`.trim() + ".";
  }
}
