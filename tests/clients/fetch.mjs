// Node's fetch: a connection for each request, or one for all.
import { readFileSync } from "node:fs";

const [keep, url, ...requests] = process.argv.slice(2);
const [ca, cert, key] = ["CA", "CERT", "KEY"].map((name) => readFileSync(process.env[name]));
await fetch("data:,"); // makes the dispatcher, whose class cannot be imported
const Agent = globalThis[Symbol.for("undici.globalDispatcher.1")].constructor;
const pipelining = keep === "new" ? 0 : 1;
const dispatcher = new Agent({ connect: { ca, cert, key }, connections: 1, pipelining });

for (const request of requests) {
    const [method, target, type, file] = request.split(" ");
    const headers = type ? { "content-type": type } : {};
    const body = file && readFileSync(file);
    const signal = AbortSignal.timeout(20000);
    const answer = await fetch(url + target, { method, headers, body, dispatcher, signal });
    await answer.arrayBuffer();
    console.log(answer.status);
}
await dispatcher.close();
