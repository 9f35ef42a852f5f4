// Node's fetch: a connection for each request, or one for all. It refuses to send `Expect`; that
// request goes by Node's http.
import { readFileSync } from "node:fs";
import http from "node:http";
import https from "node:https";

const [keep, url, ...requests] = process.argv.slice(2);
const [ca, cert, key] = ["CA", "CERT", "KEY"].map((name) => readFileSync(process.env[name]));
await fetch("data:,"); // makes the dispatcher, whose class cannot be imported
const Agent = globalThis[Symbol.for("undici.globalDispatcher.1")].constructor;
const pipelining = keep === "new" ? 0 : 1;
const dispatcher = new Agent({ connect: { ca, cert, key }, connections: 1, pipelining });

const by_http = (target, method, headers, body) => new Promise((done, failed) => {
    const options = { method, headers, ca, cert, key, agent: false, timeout: 20000 };
    const request = (url.startsWith("https") ? https : http).request(url + target, options);
    request.on("continue", () => request.end(body)).on("error", failed);
    request.on("timeout", () => request.destroy(new Error("no answer within 20 s")));
    request.on("response", (answer) => answer.resume().on("end", () => done(answer.statusCode)));
    request.flushHeaders();
});

for (const request of requests) {
    const [method, target, type, file, expect] = request.split(" ");
    const headers = type ? { "content-type": type } : {};
    const body = file && readFileSync(file);
    if (expect) {
        const more = { ...headers, expect, "content-length": body.length };
        console.log(await by_http(target, method, more, body));
    } else {
        const signal = AbortSignal.timeout(20000);
        const answer = await fetch(url + target, { method, headers, body, dispatcher, signal });
        await answer.arrayBuffer();
        console.log(answer.status);
    }
}
await dispatcher.close();
