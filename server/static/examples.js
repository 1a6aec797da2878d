// The prompt that the page opens with: the bundled model's own, or a long English document and a question about it.

const QUESTION = "Who keeps the key of the glass case in the museum?";

// model: what /calidrop/config says. Answers { prompt, budget, chat }.
export async function example(model) {
  if (/(^|\/)(smooth|plain)$/.test(model.model)) {
    return { prompt: await text("example.txt"), budget: 64, chat: false };
  }
  const document = await text("document.txt");
  const question = model.chat ? `${QUESTION} Answer in one sentence.` : `Question: ${QUESTION}\nAnswer:`;
  return { prompt: `${document}\n\n${question}`, budget: 128, chat: model.chat };
}

async function text(file) {
  return (await (await fetch(file)).text()).trim();
}
