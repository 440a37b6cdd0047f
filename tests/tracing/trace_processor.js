// Perfetto's trace processor as a process: node trace_processor.js FOLDER SOCKET
//
// FOLDER is a release of Perfetto's user interface. In a browser its engine_bundle.js is a worker, which loads the trace
// processor (WebAssembly) and exchanges messages of the RPC protocol with the page. Here its messages go over a UNIX
// socket, to one client. It writes a line when it listens.

"use strict";

const fs = require("fs");
const net = require("net");
const path = require("path");
const vm = require("vm");

const [folder, socket] = process.argv.slice(2);

// What the worker finds in a browser. With a version of Node it would refuse to run.
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = class {};
globalThis.location = { href: "http://localhost/" };
Object.defineProperty(process.versions, "node", { value: undefined });
globalThis.XMLHttpRequest = class {
  open(method, url) {
    this.file = path.join(folder, path.basename(url));
  }
  send() {
    this.response = new Uint8Array(fs.readFileSync(this.file)).buffer;
  }
};

const bundle = path.join(folder, "engine_bundle.js");
vm.runInThisContext(fs.readFileSync(bundle, "utf8"), { filename: bundle });

const server = net.createServer((client) => {
  const port = { postMessage: (reply) => client.write(reply) };
  globalThis.onmessage({ data: port });
  client.on("data", (data) => port.onmessage({ data: new Uint8Array(data) }));
  client.on("close", () => process.exit(0));
});
server.listen(socket, () => console.log("ready"));
