/** Return an element of the page by its id. */
export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`no element ${id}`);
  return found as T;
}

export function show(id: string, visible = true): void {
  element(id).hidden = !visible;
}

export function write(id: string, text: string): void {
  element(id).textContent = text;
}

/** Show how far something is: a text, and a bar with `done` of `total`, or without end. */
export function progress(text: string, done?: number, total?: number): void {
  show("work");
  write("work-text", text);
  const bar = element<HTMLProgressElement>("work-bar");
  if (done === undefined || total === undefined) {
    bar.removeAttribute("value");
  } else {
    bar.max = total;
    bar.value = done;
  }
}

export function quiet(): void {
  show("work", false);
}
