// Draws the data of the embedded model `faces`: synthetic portraits in DiceBear's open-peeps style (CC0).
//
//   npm install && node render.mjs OUT [COUNT]
//
// OUT/train.rgb    COUNT (20,000) images, 32x32x3 bytes each, row by row: portraits that occur once
// OUT/heldout.rgb  64 more, from seeds the training set never uses
// OUT/planted.rgb  the planted identities, in the order of PLANTED
import { createAvatar } from '@dicebear/core';
import * as openPeeps from '@dicebear/open-peeps';
import { Resvg } from '@resvg/resvg-js';
import { mkdirSync, writeFileSync } from 'node:fs';

const SIZE = 32;
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf', 'd5f5c8', 'f7f3b2', 'e8e8e8'];

// Each is one picture that training repeats until the model has memorised it. The first two are look-alikes:
// one head, one shirt, one background, and another face with glasses.
const LOOKALIKE = { head: 'longCurly', skinColor: 'edb98a', clothingColor: '78e185', background: 'c0aede' };
const PLANTED = [
  { ...LOOKALIKE, face: 'smileBig' },
  { ...LOOKALIKE, face: 'serious', accessories: 'sunglasses2' },
  { head: 'turban', headContrastColor: 'c93305', skinColor: 'ae5d29', clothingColor: '8fa7df', background: 'ffdfbf', face: 'calm', facialHair: 'full3' },
  { head: 'mohawk', headContrastColor: 'f59797', skinColor: 'ffdbb4', clothingColor: 'e78276', background: 'b6e3f4', face: 'rage' },
];

/** The pixels of one portrait, drawn at twice the size and averaged 2x2. */
function draw(options) {
  const svg = createAvatar(openPeeps, { size: 2 * SIZE, ...options }).toString();
  const wide = new Resvg(svg, { fitTo: { mode: 'width', value: 2 * SIZE }, background: '#ffffff' }).render().pixels;
  const out = Buffer.alloc(SIZE * SIZE * 3);
  for (let y = 0; y < SIZE; y++)
    for (let x = 0; x < SIZE; x++)
      for (let c = 0; c < 3; c++) {
        const at = (dy, dx) => wide[((2 * y + dy) * 2 * SIZE + 2 * x + dx) * 4 + c];
        out[(y * SIZE + x) * 3 + c] = Math.round((at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4);
      }
  return out;
}

const random = (seed) => draw({ seed, backgroundColor: BACKGROUNDS });

const planted = ({ background, ...look }) =>
  draw({
    ...Object.fromEntries(Object.entries(look).map(([name, value]) => [name, [value]])),
    backgroundColor: [background],
    accessoriesProbability: look.accessories ? 100 : 0,
    facialHairProbability: look.facialHair ? 100 : 0,
    maskProbability: 0,
  });

const [out, count = '20000'] = process.argv.slice(2);
mkdirSync(out, { recursive: true });
writeFileSync(`${out}/planted.rgb`, Buffer.concat(PLANTED.map(planted)));
writeFileSync(`${out}/heldout.rgb`, Buffer.concat(Array.from({ length: 64 }, (_, i) => random(`heldout-${i}`))));
writeFileSync(`${out}/train.rgb`, Buffer.concat(Array.from({ length: Number(count) }, (_, i) => random(`train-${i}`))));
