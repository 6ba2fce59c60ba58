// What the page loads before anything else, each file checked against the hash in its plan.
import engineUrl from "../../parts/engine.wasm?url";
import workerUrl from "../engine/worker?worker&url";
import type { Engines } from "../engine/pool";
import { PageError } from "../errors";
import { modelFile } from "../files";
import { Model } from "../model";
import { type Plan, planProblem } from "../plan";
import type { Store } from "../store";
import { TextCodec } from "../text";

/** Return the page's plan. Its hash is in the page itself, so that the page's digest stands for everything. */
export async function loadPlan(): Promise<Plan> {
  const integrity = document.querySelector<HTMLMetaElement>('meta[name="cipherlm-plan"]')?.content;
  if (!integrity) throw new PageError("this page was not written by `cipherlm page` or `cipherlm serve --page`");
  const plan: unknown = await (await checked("page.json", integrity)).json();
  const problem = planProblem(plan);
  if (problem !== undefined) throw new PageError(problem);
  return plan as Plan;
}

/** Compile the engine, and prepare what starts workers with it. */
export async function loadEngines(plan: Plan): Promise<Engines> {
  const [engine, worker] = await Promise.all([asset(plan, engineUrl), asset(plan, workerUrl)]);
  const module = await WebAssembly.compile(await engine.arrayBuffer());
  // A worker's script has no integrity attribute of its own: it is run from what was checked.
  const script = URL.createObjectURL(new Blob([await worker.arrayBuffer()], { type: "text/javascript" }));
  return { module, start: () => new Worker(script) };
}

/** Load the client's part of the model, and its tokenizer. */
export async function loadModel(
  plan: Plan,
  store: Store,
  report: (received: number, size: number) => void,
): Promise<{ model: Model; codec: TextCodec }> {
  const json = async (name: string): Promise<unknown> =>
    JSON.parse(new TextDecoder().decode(await modelFile(plan, store, name, () => undefined)));
  const model = new Model(plan, await modelFile(plan, store, "model.safetensors", report));
  return { model, codec: new TextCodec(plan, await json("tokenizer.json"), await json("tokenizer_config.json")) };
}

function asset(plan: Plan, url: string): Promise<Response> {
  const path = new URL(url, import.meta.url).href.slice(new URL(".", location.href).href.length);
  const integrity = plan.assets[path];
  if (integrity === undefined) throw new PageError(`${path} is not one of this page's files`);
  return checked(path, integrity);
}

async function checked(path: string, integrity: string): Promise<Response> {
  try {
    const response = await fetch(path, { integrity, credentials: "omit", referrerPolicy: "no-referrer" });
    if (response.ok) return response;
  } catch {
    // as below
  }
  throw new PageError(`${path} is missing, or not the file that belongs to this page`);
}
