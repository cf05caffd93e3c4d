// Drives ComfyUI's real frontend in headless Chromium; prints one JSON line of claims.
// usage: node drive.mjs '{"url": …, "chromium": …, "workflows": […], "shots": folder or null}'
import { chromium } from 'playwright-core';

const asked = JSON.parse(process.argv[2]);
const PACK = 'lightx2v-distill';
const SAMPLER = 'LightX2VDistillSampler';
const PROMPT = 'a small green triangle moving up on a dark background';
const QUIET = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const results = {};
const browser = await chromium.launch({ executablePath: asked.chromium, args: QUIET });
const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
const crashes = [];
page.on('pageerror', (error) => crashes.push(String(error).slice(0, 300)));

function expect(fact, told) {
  if (!fact) throw new Error(typeof told === 'string' ? told : JSON.stringify(told));
}

async function claim(name, work) {
  try {
    results[name] = { ok: true, detail: (await work()) ?? '' };
  } catch (error) {
    results[name] = { ok: false, detail: `${error.message}\n${crashes.join('\n')}`.slice(0, 1500) };
    await shot(`failed_${name}`);
  }
}

async function shot(name, clip) {
  if (!asked.shots) return;
  await page.waitForTimeout(400);
  await page.screenshot({ path: `${asked.shots}/${name}.jpg`, type: 'jpeg', quality: 42, clip });
}

const command = (id) => page.evaluate((id) => window.app.extensionManager.command.execute(id), id);

// Shows the nodes of these types (all without any) as large as they fit beside the panels.
async function look(...types) {
  await page.evaluate((types) => {
    const nodes = window.app.graph.nodes.filter((n) => !types.length || types.includes(n.type));
    const left = Math.min(...nodes.map((n) => n.pos[0]));
    const top = Math.min(...nodes.map((n) => n.pos[1])) - 60;
    const width = Math.max(...nodes.map((n) => n.pos[0] + n.size[0])) - left;
    const height = Math.max(...nodes.map((n) => n.pos[1] + n.size[1])) - top;
    const ds = window.app.canvas.ds;
    ds.scale = Math.min(1500 / width, 800 / height, 1.1);
    ds.offset = [80 / ds.scale - left, 80 / ds.scale - top];
    window.app.canvas.setDirty(true, true);
  }, types);
  await page.waitForTimeout(900);
}

// What the server has sent since the last call of `listen`.
async function listen() {
  await page.evaluate(() => {
    window.heard = { progress: [], previews: 0, end: null, error: null };
    if (window.isListening) return;
    window.isListening = true;
    const api = window.app.api;
    const on = (name, act) => api.addEventListener(name, (event) => act(event.detail));
    on('progress', (d) => window.heard.progress.push([d.value, d.max]));
    on('b_preview', () => (window.heard.previews += 1));
    on('execution_success', () => (window.heard.end = 'success'));
    on('execution_interrupted', () => (window.heard.end = 'interrupted'));
    on('execution_error', (d) => {
      window.heard.error = d.exception_message;
      window.heard.end = 'error';
    });
  });
}

async function run() {
  await listen();
  await page.getByTestId('queue-button').click();
}

async function ended(expected) {
  await page.waitForFunction(() => window.heard.end !== null, null, { timeout: 60000 });
  await page.waitForTimeout(600);
  const heard = await page.evaluate(() => window.heard);
  expect(heard.end === expected, heard);
  return heard;
}

async function openTemplates() {
  const category = page.getByText(PACK, { exact: true }).first();
  if (!(await category.isVisible().catch(() => false))) await command('Comfy.BrowseTemplates');
  await category.waitFor({ timeout: 15000 });
  await category.click();
  await page.getByTestId(`template-workflow-${asked.workflows[0]}`).waitFor({ timeout: 15000 });
  await page.waitForTimeout(1200);
}

async function openTemplate(name) {
  await openTemplates();
  await page.getByTestId(`template-workflow-${name}`).click();
  await page.waitForFunction(() => !document.querySelector('[role=dialog]'), null, { timeout: 15000 });
  await page.waitForTimeout(1500);
}

const setWidget = (type, name, value) =>
  page.evaluate(([type, name, value]) => {
    const node = window.app.graph.nodes.find((n) => n.type === type);
    const widget = node.widgets.find((w) => w.name === name);
    if (!widget) throw new Error(`${type} has ${node.widgets.map((w) => w.name)}, no ${name}`);
    widget.value = value;
    widget.callback?.(value);
  }, [type, name, value]);

const graph = () =>
  page.evaluate(() => {
    const nodes = window.app.graph.nodes;
    const boxes = nodes.map((n) => [n.type, ...n.pos, ...n.size]);
    const overlaps = boxes.flatMap((a, i) =>
      boxes.slice(i + 1)
        .filter((b) => a[1] < b[1] + b[3] && b[1] < a[1] + a[3] && a[2] - 30 < b[2] + b[4] && b[2] - 30 < a[2] + a[4])
        .map((b) => `${a[0]} on ${b[0]}`));
    return {
      types: nodes.map((n) => n.type),
      red: nodes.filter((n) => n.has_errors || !window.LiteGraph.registered_node_types[n.type]).map((n) => n.type),
      texts: nodes.flatMap((n) => (n.widgets ?? []).map((w) => w.value).filter((v) => typeof v === 'string')),
      overlaps,
    };
  });

await page.goto(asked.url, { waitUntil: 'domcontentloaded' });
await page.waitForFunction(() => window.app?.graph && window.app.extensionManager?.command, null, { timeout: 60000 });
await page.waitForTimeout(2000);
await page.evaluate(async () => {
  const set = window.app.extensionManager.setting;
  await set.set('Comfy.Minimap.Visible', false);
  await set.set('LiteGraph.Canvas.MinFontSizeForLOD', 0);
});

await claim('the_template_browser_shows_every_workflow_with_its_thumbnail', async () => {
  await openTemplates();
  const cards = await page.evaluate(() =>
    [...document.querySelectorAll('[data-testid^="template-workflow-"]')].map((card) => [
      card.dataset.testid.replace('template-workflow-', ''),
      card.querySelector('img')?.naturalWidth ?? 0,
    ]));
  expect(cards.map((c) => c[0]).sort().join() === [...asked.workflows].sort().join(), cards);
  expect(cards.every((c) => c[1] > 100), cards);
  await shot('templates');
});

for (const name of asked.workflows)
  await claim(`opened_from_the_template_browser_${name}_has_no_red_and_no_overlapping_node`, async () => {
    await openTemplate(name);
    const seen = await graph();
    expect(seen.types.includes(SAMPLER), seen.types);
    expect(!seen.red.length && !seen.overlaps.length, seen);
    await look();
    if (name.includes('2.2')) await shot(`opened_${name}`);
  });

await claim('a_changed_prompt_runs_the_demo_with_progress_previews_plan_and_last_line', async () => {
  await openTemplate('t2v_demo');
  await look();
  await page.locator('textarea').evaluateAll((areas, text) => {
    const area = areas.find((a) => a.value.includes('circle'));
    area.value = text;
    area.dispatchEvent(new Event('input', { bubbles: true }));
  }, PROMPT);
  await run();
  const heard = await ended('success');
  const steps = heard.progress.filter((p) => p[1] === 4).map((p) => p[0]);
  expect(steps.includes(1) && steps.at(-1) === 4 && heard.previews >= 4, heard);
  const { texts } = await graph();
  expect(texts.some((t) => t.startsWith('4 steps, euler, CFG off') && t.includes('done: ')), texts);
  await page.waitForTimeout(1500);
  const after = await graph();
  expect(!after.overlaps.length, after.overlaps);
  await look(SAMPLER, 'LightX2VDecodeVideo', 'PreviewAny', 'SaveVideo');
  await shot('finished');
  return heard.progress.length + ' progress events, ' + heard.previews + ' previews';
});

await claim('the_video_dropped_on_the_canvas_brings_the_graph_back', async () => {
  const path = await page.evaluate(async () => {
    const history = Object.values(await (await fetch('/api/history?max_items=1')).json())[0];
    const saved = Object.values(history.outputs).flatMap((o) => o.images ?? []).find((i) => i.filename.endsWith('.mp4'));
    return `/api/view?${new URLSearchParams(saved)}`;
  });
  await openTemplate('i2v_demo');
  expect(!(await graph()).texts.includes(PROMPT), 'another graph is open');
  await page.evaluate(async (path) => {
    const blob = await (await fetch(path)).blob();
    const data = new DataTransfer();
    data.items.add(new File([blob], 'dropped.mp4', { type: 'video/mp4' }));
    const target = document.querySelector('#graph-canvas');
    target.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, clientX: 800, clientY: 400 }));
  }, path);
  await page.waitForTimeout(2500);
  const seen = await graph();
  expect(seen.texts.includes(PROMPT) && seen.types.includes(SAMPLER) && !seen.red.length, seen);
});

await claim('a_setting_the_model_was_not_trained_for_is_a_warning_in_the_plan_on_the_canvas', async () => {
  await openTemplate('t2v_demo');
  await setWidget(SAMPLER, 'schedule', 'steps');
  await setWidget(SAMPLER, 'schedule.steps', 2);
  await run();
  await ended('success');
  const { texts } = await graph();
  expect(texts.some((t) => t.includes('warning: ')), texts);
  await look(SAMPLER, 'PreviewAny');
  await shot('warning');
  return texts.find((t) => t.includes('warning: ')).split('\n').find((l) => l.startsWith('warning'));
});

await claim('an_interrupt_stops_the_run_without_an_error', async () => {
  await openTemplate('t2v_demo');
  await setWidget(SAMPLER, 'schedule', 'steps');
  await setWidget(SAMPLER, 'schedule.steps', 100);
  await run();
  await page.waitForFunction(() => window.heard.progress.some((p) => p[1] === 100 && p[0] >= 2), null, { timeout: 60000 });
  await command('Comfy.Interrupt');
  const heard = await ended('interrupted');
  expect(heard.progress.at(-1)[0] < 100, heard.progress.at(-1));
  const dialogs = await page.evaluate(() => document.querySelectorAll('[role=dialog]').length);
  expect(dialogs === 0 && heard.error === null, heard.error);
  return `stopped at step ${heard.progress.at(-1)[0]} of 100`;
});

await claim('a_value_out_of_range_is_an_error_on_its_own_widget', async () => {
  await openTemplate('t2v_demo');
  await setWidget('LightX2VEmptyVideoLatent', 'frames', 100000);
  await page.getByTestId('queue-button').click();
  await page.waitForTimeout(2000);
  const marked = await page.evaluate(() =>
    window.app.graph.nodes.filter((n) => n.has_errors)
      .map((n) => [n.type, (n.inputs ?? []).filter((i) => i.hasErrors).map((i) => i.name)]));
  expect(JSON.stringify(marked) === '[["LightX2VEmptyVideoLatent",["frames"]]]', marked);
  await look('LightX2VEmptyVideoLatent', 'CLIPTextEncode');
  await shot('invalid');
});

await claim('a_start_image_on_a_text_model_is_refused_in_a_sentence_on_the_node', async () => {
  await openTemplate('i2v_demo');
  await setWidget('LightX2VLoadModel', 'file', 'lightx2v_demo/demo_t2v.safetensors');
  await run();
  const heard = await ended('error');
  expect(heard.error.includes('this is a text-to-video model and a start image is connected'), heard);
  await look('LightX2VImageToVideo', SAMPLER);
  await shot('refused');
  return heard.error;
});

await claim('the_help_page_of_the_sampler_renders', async () => {
  await openTemplate('t2v_demo');
  await page.evaluate((type) => window.app.canvas.selectNode(window.app.graph.nodes.find((n) => n.type === type)), SAMPLER);
  await page.getByTestId('info-button').first().click();
  await page.getByText('Settings outside of what the model was trained for').first().waitFor({ timeout: 10000 });
  expect((await page.locator('table').filter({ hasText: 'model_base' }).count()) > 0, 'no table');
  await shot('help');
});

for (const words of asked.searches)
  await claim(`the_node_search_finds_our_nodes_for_${words.replaceAll(' ', '_')}`, async () => {
    await command('Workspace.SearchBox.Toggle');
    await page.waitForTimeout(600);
    await page.keyboard.type(words);
    await page.waitForTimeout(1000);
    const found = await page.evaluate(() => [...document.querySelectorAll('[role=option]')].map((o) => o.innerText.split('\n')[0]));
    if (words === asked.searches[0] || words === '4 step') await shot(`search_${words.replaceAll(' ', '_')}`);
    await page.keyboard.press('Escape');
    await page.waitForTimeout(400);
    expect(found.some((name) => name.includes('(LightX2V)')), found);
    return found.filter((name) => name.includes('(LightX2V)')).length + ' of ' + found.length;
  });

console.log('RESULTS ' + JSON.stringify(results));
await browser.close();
