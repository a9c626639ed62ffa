// The official Node client over the whole surface. Prints one JSON object: a check's name to its error, or null.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const { COSERVE_URL, COSERVE_MODEL: model, COSERVE_NODE } = process.env;
const installed = createRequire(join(COSERVE_NODE, "package.json"));
const OpenAI = installed("openai").default;
const { toFile } = installed("openai");
const { zodResponseFormat, zodTextFormat } = installed("openai/helpers/zod");
const { z } = installed("zod");

const client = new OpenAI({ baseURL: `${COSERVE_URL}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "What is 7 + 5?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 24 };
const weather = {
  name: "get_weather",
  description: "Current weather of a city.",
  parameters: {
    type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false,
  },
};
const tools = [{ type: "function", function: weather }];
const asked = [{ role: "user", content: "What is the weather in Paris?" }];

async function all(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error("nothing was refused");
}

const checks = {
  async models() {
    const listed = await all(client.models.list());
    assert.ok(listed.some((card) => card.id === model && card.object === "model"));
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async chat() {
    const { data, response, request_id } = await client.chat.completions.create(greedy).withResponse();
    assert.match(data.choices[0].message.content, /\b12\b/);
    assert.equal(data.choices[0].finish_reason, "stop");
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
    assert.equal(request_id, response.headers.get("x-request-id"));
    assert.equal(data.id, `chatcmpl-${request_id}`);
  },

  async chat_stream() {
    const whole = await client.chat.completions.create(greedy);
    const chunks = await all(
      await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }),
    );
    const text = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta.content ?? "").join("");
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  },

  async stream_helper() {
    const seen = [];
    const runner = client.chat.completions.stream(greedy);
    runner.on("content", (delta) => seen.push(delta));
    const final = await runner.finalChatCompletion();
    assert.equal(seen.join(""), final.choices[0].message.content);
    assert.match(await runner.finalContent(), /\b12\b/);
  },

  async several_answers() {
    const body = { ...greedy, temperature: 1.2, n: 3, seed: 4, logprobs: true, top_logprobs: 2 };
    const [first, second] = [await client.chat.completions.create(body), await client.chat.completions.create(body)];
    assert.deepEqual(first.choices, second.choices);
    assert.deepEqual(first.choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(first.choices.every((choice) => choice.logprobs.content[0].top_logprobs.length === 2));
  },

  async tools() {
    const { choices } = await client.chat.completions.create({ model, messages: asked, tools, temperature: 0 });
    const [call] = choices[0].message.tool_calls;
    assert.equal(choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert.equal(JSON.parse(call.function.arguments).city, "Paris");
    const answered = await client.chat.completions.create({
      model,
      messages: [...asked, choices[0].message, { role: "tool", tool_call_id: call.id, content: '{"sky": "sunny"}' }],
      tools,
      temperature: 0,
    });
    assert.ok(answered.choices[0].message.content.length > 0);
  },

  async tools_streamed() {
    const runner = client.chat.completions.stream({ model, messages: asked, tools, temperature: 0 });
    const final = await runner.finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.equal(JSON.parse(call.function.arguments).city, "Paris");
  },

  async run_tools() {
    const cities = [];
    const runner = client.chat.completions.runTools({
      model,
      messages: asked,
      temperature: 0,
      tools: [
        {
          type: "function",
          function: {
            ...weather,
            parse: JSON.parse,
            function: ({ city }) => (cities.push(city), '{"sky": "sunny"}'),
          },
        },
      ],
    });
    assert.ok((await runner.finalContent()).length > 0);
    assert.deepEqual(cities, ["Paris"]);
  },

  async json_schema() {
    const form = z.object({ sum: z.number(), parity: z.enum(["odd", "even"]) });
    const answer = await client.chat.completions.parse({
      ...greedy, max_tokens: 60, response_format: zodResponseFormat(form, "sum"),
    });
    assert.ok(form.safeParse(answer.choices[0].message.parsed).success);
  },

  async completions() {
    const body = { model, prompt: ["Once", "Twice"], max_tokens: 6, temperature: 0, logprobs: 2, echo: true };
    const { choices } = await client.completions.create(body);
    assert.deepEqual(choices.map((choice) => choice.text.slice(0, 4)), ["Once", "Twic"]);
    assert.equal(choices[0].logprobs.token_logprobs[0], null);
    const chunks = await all(await client.completions.create({ ...body, prompt: "Once", stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), choices[0].text);
  },

  async responses() {
    const first = await client.responses.create({ model, input: "What is 7 + 5?", temperature: 0 });
    assert.match(first.output_text, /\b12\b/);
    const stream = client.responses.stream({ model, input: "What is 7 + 5?", temperature: 0 });
    const events = await all(stream);
    assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, place) => place));
    assert.equal((await stream.finalResponse()).output_text, first.output_text);
    const second = await client.responses.create({ model, input: "And 8 + 2?", previous_response_id: first.id });
    assert.equal(second.previous_response_id, first.id);
    assert.ok(second.usage.input_tokens > first.usage.input_tokens);
    assert.deepEqual(await client.responses.retrieve(first.id), first);
    assert.equal((await all(client.responses.inputItems.list(first.id))).length, 1);
    await client.responses.delete(first.id);
    assert.equal((await failure(client.responses.retrieve(first.id))).status, 404);
  },

  async response_calls() {
    const body = { model, temperature: 0, tools: [{ type: "function", strict: false, ...weather }] };
    const first = await client.responses.create({ ...body, input: asked[0].content });
    const [call] = first.output.filter((item) => item.type === "function_call");
    assert.equal(JSON.parse(call.arguments).city, "Paris");
    const output = { type: "function_call_output", call_id: call.call_id, output: '{"sky": "sunny"}' };
    const second = await client.responses.create({ ...body, input: [output], previous_response_id: first.id });
    assert.ok(second.output_text.length > 0);
  },

  async response_schema() {
    const form = z.object({ sum: z.number() });
    const answer = await client.responses.parse({
      model, input: "What is 7 + 5?", temperature: 0, max_output_tokens: 60,
      text: { format: zodTextFormat(form, "sum") },
    });
    assert.equal(typeof answer.output_parsed.sum, "number");
  },

  async files_and_jobs() {
    const rows = Array.from({ length: 8 }, (_, i) => ({
      messages: [
        { role: "user", content: `What is ${i} + 1?` },
        { role: "assistant", content: `Aye: ${i + 1}.` },
      ],
    }));
    const data = Buffer.from(rows.map((row) => JSON.stringify(row)).join("\n"));
    const file = await client.files.create({ file: await toFile(data, "train.jsonl"), purpose: "fine-tune" });
    assert.equal(file.bytes, data.length);
    assert.equal((await client.files.retrieve(file.id)).filename, "train.jsonl");
    assert.ok((await all(client.files.list({ limit: 1 }))).some((found) => found.id === file.id));
    assert.equal(await (await client.files.content(file.id)).text(), data.toString());
    const job = await client.fineTuning.jobs.create({
      model, training_file: file.id, seed: 3, suffix: "node", metadata: { from: "node" },
      method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 4 } } },
    });
    let state = job;
    while (!["succeeded", "failed", "cancelled"].includes(state.status)) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      state = await client.fineTuning.jobs.retrieve(job.id);
    }
    assert.equal(state.status, "succeeded");
    const events = await all(client.fineTuning.jobs.listEvents(job.id, { limit: 2 }));
    const steps = events.filter((event) => event.type === "metrics").map((event) => event.data.step);
    assert.deepEqual(steps, [2, 1]);
    assert.ok((await all(client.fineTuning.jobs.list())).some((found) => found.id === job.id));
    assert.ok((await all(client.fineTuning.jobs.checkpoints.list(job.id))).length > 0);
    const answer = await client.chat.completions.create({ ...greedy, model: state.fine_tuned_model });
    assert.equal(answer.model, state.fine_tuned_model);
    assert.ok((await client.models.delete(state.fine_tuned_model)).deleted);
    assert.ok((await client.files.delete(file.id)).deleted);
  },

  async errors() {
    const unknown = await failure(client.chat.completions.create({ ...greedy, model: "nobody" }));
    assert.ok(unknown instanceof OpenAI.NotFoundError);
    assert.deepEqual([unknown.code, unknown.param, unknown.type], ["model_not_found", "model", "invalid_request_error"]);
    assert.ok(unknown.requestID);
    const bad = await failure(client.chat.completions.create({ ...greedy, temperature: 7 }));
    assert.ok(bad instanceof OpenAI.BadRequestError);
    assert.equal(bad.param, "temperature");
    const left_out = await failure(client.embeddings.create({ model, input: "x" }));
    assert.equal(left_out.code, "unsupported");
    const gone = await failure(client.fineTuning.jobs.retrieve("ftjob-none"));
    assert.ok(gone instanceof OpenAI.NotFoundError);
  },

  async abort() {
    const long = { ...greedy, max_tokens: 1500, stream: true, ignore_eos: true };
    const stream = await client.chat.completions.create(long);
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 3) stream.controller.abort();
    }
    assert.ok(chunks < 100);
    const controller = new AbortController();
    const unary = client.chat.completions.create({ ...long, stream: false }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 100);
    assert.ok((await failure(unary)) instanceof OpenAI.APIUserAbortError);
    for (let i = 0; i < 100; i += 1) {
      const text = await (await fetch(`${COSERVE_URL}/metrics`)).text();
      if (/^vllm:num_requests_running\{.*\} 0(\.0)?$/m.test(text)) return;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    throw new Error("requests still run");
  },
};

const found = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    found[name] = null;
  } catch (error) {
    found[name] = String(error.stack ?? error);
  }
}
console.log(JSON.stringify(found));
