// Server-sent events out of a fetch's body: EventSource can't send a POST.

// A carriage return at the end of a chunk may be half of a line end.
const LINE_END = /\r\n|\n|\r(?!$)/;

/** Yields the {type, data} of every whole event of a stream of bytes. */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = newEvent();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (done ? "\n" : value)).split(LINE_END);
      rest = lines.pop();
      for (const line of lines) {
        if (line !== "") {
          addLine(event, line);
          continue;
        }
        if (event.data.length > 0) yield { type: event.type, data: event.data.join("\n") };
        event = newEvent();
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function newEvent() {
  return { type: "message", data: [] };
}

function addLine(event, line) {
  const colon = line.indexOf(":");
  const field = colon < 0 ? line : line.slice(0, colon);
  const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
  if (field === "data") event.data.push(value);
  if (field === "event") event.type = value;
}
