// How a result was made: the command if the manifest tells it, recipe, options, source and versions.

function howItWasMade(f) {
  const list = el("dl", { className: "made" });
  const add = (name, ...values) => list.append(el("div", {}, el("dt", { textContent: name }), el("dd", {}, ...values)));
  const pairs = values => el("ul", {}, ...values.map(([name, value]) => el("li", {}, el("code", { textContent: name }), ` ${value}`)));
  if (f.command) add("Command", el("pre", { tabIndex: 0, textContent: f.command }));
  if (f.recipe) add("Recipe", f.recipe);
  if (f.rules?.length) add("Rules, first match wins", el("ol", {}, ...f.rules.map(([what, codec]) => el("li", {}, `${what}: `, el("b", { textContent: codec })))));
  else if (f.rules) add("Rules", "none: every tensor is kept");
  if (f.runtime) add("Runtime", f.runtime);
  if (f.options.length) add("Options", pairs(f.options));
  const source = [f.source, f.address !== f.source && f.address, f.revision && `at ${f.revision}`].filter(Boolean).join(" · ");
  if (source) add("Source", source);
  add("Versions", pairs([["ernie-quant", f.version || NONE], ...f.libraries]));
  return list;
}
